"""Qwen2.5 decoder (arXiv:2412.15115) over embeddings: text and visual tokens look alike to it.

Attribute names are those of AIDC-AI's checkpoints.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ovis_model.config import LanguageConfig
from ovis_model.kv_cache import Memory
from ovis_model.layers import FusedRMSNorm, lay_out


class Qwen2ForCausalLM(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.model = Qwen2Model(config)
        # Tied checkpoints have no output matrix of their own: the embedding table is it.
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def fuse(self) -> None:
        """Lay out for inference: see `lay_out` and `FusedRows`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = lay_out(module.weight.data)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.qkv.fuse()
            if isinstance(module, GatedMLP):
                module.gate_up.fuse()

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
        self.norm = FusedRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, position_ids: Tensor, memory: Memory) -> Tensor:
        """[B, T, hidden_size], int64[B, T] -> [B, T, hidden_size]; `memory` takes in what the layers add."""
        rotary = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotary, memory)
        out: Tensor = self.norm(hidden)
        return out


Rotary = tuple[Tensor, Tensor]


def rotary_table(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines [B, T, 1, head_dim] of RoPE (arXiv:2104.09864), angles in float32.

    The first half of the sines is negated: see `rotate`.
    """
    angles = position_ids[:, :, None, None].float() * _frequencies(head_dim, theta, position_ids.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / theta**exponents).to(device)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Apply RoPE to [B, T, heads, head_dim]; the two halves of a head are the pairs."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, index)
        self.mlp = GatedMLP(config)
        self.input_layernorm = FusedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = FusedRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: Rotary, memory: Memory) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, memory)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class SelfAttention(nn.Module):
    """Grouped-query attention. The three input projections are one product over `FusedRows`."""

    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.layer_index = index
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.qkv = FusedRows(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, hidden: Tensor, rotary: Rotary, memory: Memory) -> Tensor:
        batch, length, size = hidden.shape
        heads = self.qkv(hidden).view(batch, length, self.num_heads + 2 * self.num_kv_heads, -1)
        turned = rotate(heads[:, :, : -self.num_kv_heads], rotary)
        query, key = turned[:, :, : self.num_heads], turned[:, :, self.num_heads :]
        value = heads[:, :, -self.num_kv_heads :]
        attended = memory.attend(self.layer_index, query, key, value)
        out: Tensor = self.o_proj(attended.reshape(batch, length, size))
        return out


class GatedMLP(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up = FusedRows(self.gate_proj, self.up_proj)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class FusedRows:
    """Several linear layers over the same input as one matrix product.

    `fuse` lays their parameters out as parts of one matrix, so that names and state dict stay those of the checkpoint
    and no weight is held twice; until then, and while training, the matrix is put together for each product.
    """

    def __init__(self, *parts: nn.Linear) -> None:
        self._parts = parts
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def fuse(self) -> None:
        """On the device and in the type that the parameters have now; moving them later would undo it."""
        with torch.no_grad():
            weight, self._bias = self._stacked()
            self._weight = lay_out(weight)
        start = 0
        for part in self._parts:
            rows = slice(start, start + part.out_features)
            part.weight.data = self._weight[rows]
            if self._bias is not None:
                part.bias.data = self._bias[rows]
            start = rows.stop

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._stacked() if self._weight is None else (self._weight, self._bias)
        return F.linear(x, weight, bias)

    def _stacked(self) -> tuple[Tensor, Tensor | None]:
        weights: list[Tensor] = [part.weight for part in self._parts]
        biases: list[Tensor] = [part.bias for part in self._parts if part.bias is not None]
        return torch.cat(weights), torch.cat(biases) if biases else None
