"""Qwen2.5 decoder (arXiv:2412.15115) over embeddings: text and visual tokens look alike to it.

Attribute names are those of AIDC-AI's checkpoints.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ovis_model.attention import CausalPadding, attend
from ovis_model.config import LanguageConfig
from ovis_model.kv_cache import KVCache
from ovis_model.layers import RMSNorm


class Qwen2ForCausalLM(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.model = Qwen2Model(config)
        # Tied checkpoints have no output matrix of their own: the embedding table is it.
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., vocab_size]"""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)


class Qwen2Model(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, position_ids: Tensor, causal: CausalPadding, kv_cache: KVCache | None = None
    ) -> Tensor:
        """[B, T, hidden_size], int64[B, T] -> [B, T, hidden_size]; `kv_cache` grows by T tokens."""
        rotary = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotary, causal, kv_cache)
        if kv_cache is not None:
            kv_cache.length += hidden.shape[1]
        out: Tensor = self.norm(hidden)
        return out


Rotary = tuple[Tensor, Tensor]


def rotary_table(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines [B, 1, T, head_dim] of RoPE (arXiv:2104.09864), angles in float32."""
    angles = position_ids[:, None, :, None].float() * _frequencies(head_dim, theta, position_ids.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / theta**exponents).to(device)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Apply RoPE to [B, heads, T, head_dim]; the two halves of a head are the pairs."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, index)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: Rotary, causal: CausalPadding, kv_cache: KVCache | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, causal, kv_cache)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class SelfAttention(nn.Module):
    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.layer_index = index
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, rotary: Rotary, causal: CausalPadding, kv_cache: KVCache | None) -> Tensor:
        batch, length, _ = hidden.shape
        shape = (batch, length, -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (proj(hidden).view(shape).transpose(1, 2) for proj in projections)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if kv_cache is not None:
            key, value = kv_cache.append(self.layer_index, key, value)
        out: Tensor = self.o_proj(attend(query, key, value, causal).transpose(1, 2).reshape(batch, length, -1))
        return out


class GatedMLP(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out
