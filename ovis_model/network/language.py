"""The Qwen2.5 decoder (arXiv:2412.15115) for embeddings of text and of visual tokens.

Attribute names are those of AIDC-AI's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ovis_model.config import LanguageConfig
from ovis_model.network.attention import AttentionContext
from ovis_model.network.kernels import LayerKernels, Rotary
from ovis_model.network.layers import KernelModule, RMSNorm, choose_pass_dtype, lay_out, project
from ovis_model.network.quantization import Matrix, get_scales, make_matrix, set_scales
from ovis_model.network.tensor_parallel import ALONE, Shard, ShardedEmbedding, ShardedLinear


class Qwen2ForCausalLM(nn.Module):
    """The decoder with its output matrix."""

    def __init__(self, config: LanguageConfig, shard: Shard = ALONE) -> None:
        super().__init__()
        self.shard = shard
        self.model = Qwen2Model(config, shard)
        # Tied checkpoints use the embedding table as the output matrix.
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else ShardedLinear(config.hidden_size, config.vocab_size, shard.make_part(0))
        )

    def fuse(self) -> None:
        """Lay out the weights for inference, with `lay_out` and `FusedRows`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = lay_out(module.weight.data)
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.fuse()

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: [..., hidden_size] -> [..., vocab_size]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return self.shard.gather(F.linear(hidden.to(head.weight.dtype), head.weight))


class Qwen2Model(nn.Module):
    """The decoder: embedding table, layers and final norm."""

    def __init__(self, config: LanguageConfig, shard: Shard) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = ShardedEmbedding(config.vocab_size, config.hidden_size, shard)
        self.layers = nn.ModuleList(DecoderLayer(config, index, shard) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        """Run the layers and the norm: [B, T, hidden_size], int64[B, T] -> [B, T, hidden_size].

        The layers add their keys and values to `context`. Prompts (T > 1) are computed and returned in the dtype of
        `layers.choose_pass_dtype`.
        """
        if hidden.shape[1] > 1:
            hidden = hidden.to(choose_pass_dtype(hidden.dtype, hidden.device))
        if hidden.dtype != self.norm.weight.dtype:
            context = _Narrowed(context, self.norm.weight.dtype)
        rotary = compute_rotary(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        tokens, update = hidden.flatten(0, 1), None
        for layer in self.layers:
            tokens, update = layer(tokens, update, rotary, context)
        out: Tensor = self.norm.add(update, tokens)[1]
        return out.view(hidden.shape)


class _Narrowed:
    """A context in another dtype than the layers, so that a prompt attends to the same values as later decode steps."""

    def __init__(self, context: AttentionContext, dtype: torch.dtype) -> None:
        self._context, self._dtype = context, dtype

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = self._context.attend(layer, *(x.to(self._dtype) for x in (query, key, value)))
        return attended.to(query.dtype)


def compute_rotary(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Compute the cosines and sines [B, T, 1, head_dim] of RoPE (arXiv:2104.09864), with angles in float32.

    The first half of the sines is negated, as `LayerKernels.rotate` needs it.
    """
    angles = position_ids[:, :, None, None].float() * _compute_frequencies(head_dim, theta, position_ids.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


@cache
def _compute_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / theta**exponents).to(device)


class LayerWeights(NamedTuple):
    """Weights of one layer, in the order of use; matrices are [in, out], as `project` needs them."""

    input_norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    o: Matrix
    post_norm: Tensor
    gate_up: Matrix
    down: Matrix


class DecoderLayer(KernelModule):
    """Grouped-query attention and a gated MLP.

    The layer is one function over plain tensors, because calls of modules and access to their attributes took a third
    of a decode step on a CPU.
    """

    def __init__(self, config: LanguageConfig, index: int, shard: Shard) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, shard)
        self.mlp = GatedMLP(config, shard)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.index, self.head_dim, self.eps = index, config.head_dim, config.rms_norm_eps
        self.heads = (config.num_attention_heads // shard.size, shard.to_local(config).num_key_value_heads)
        self.shard = shard
        self.adapter: Callable[[LayerWeights], LayerWeights] | None = None  # what training adds to the matrices
        self._weights: LayerWeights | None = None

    def fuse(self) -> None:
        """Fuse the matrices that share an input; see `FusedRows`."""
        self.self_attn.qkv.fuse()
        self.mlp.gate_up.fuse()
        self._weights = self._gather_weights()

    def forward(
        self, tokens: Tensor, update: Tensor | None, rotary: Rotary, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """Add the update of the layer before, and return the sum with the update of the MLP, which is not yet added.

        All are [B * T, hidden_size], for all tokens. So each addition is one operation with the norm after it.
        """
        w, kernels = self._weights or self._gather_weights(), self.kernels
        if update is None:
            normalized = kernels.apply_rms_norm(tokens, w.input_norm, self.eps)
        else:
            tokens, normalized = kernels.add_rms_norm(update, tokens, w.input_norm, self.eps)
        update = self._attend(w, normalized, rotary, context)
        tokens, normalized = kernels.add_rms_norm(update, tokens, w.post_norm, self.eps)
        gate, up = project(normalized, w.gate_up).chunk(2, -1)
        return tokens, self.shard.sum(project(kernels.apply_gate(gate, up), w.down))

    def _attend(self, w: LayerWeights, tokens: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        batch, length, _, _ = rotary[0].shape
        num_heads, num_kv_heads = self.heads
        heads = project(tokens, w.qkv, w.qkv_bias).view(batch, length, -1, self.head_dim)
        query_key, value = heads.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), 2)
        query, key = self.kernels.rotate(query_key, rotary).split_with_sizes((num_heads, num_kv_heads), 2)
        attended = context.attend(self.index, query, key, value)
        return self.shard.sum(project(attended.reshape(len(tokens), -1), w.o))

    def _gather_weights(self) -> LayerWeights:
        attention, mlp = self.self_attn, self.mlp
        qkv, qkv_bias = attention.qkv.stack(self.kernels)
        gate_up, _ = mlp.gate_up.stack(self.kernels)
        o, down = (make_matrix(x.weight, get_scales(x), self.kernels) for x in (attention.o_proj, mlp.down_proj))
        norms = self.input_layernorm.weight, self.post_attention_layernorm.weight
        weights = LayerWeights(norms[0], qkv, qkv_bias, o, norms[1], gate_up, down)
        return weights if self.adapter is None else self.adapter(weights)


class SelfAttention(nn.Module):
    """The projections of attention; `DecoderLayer` applies them."""

    def __init__(self, config: LanguageConfig, shard: Shard) -> None:
        super().__init__()
        kv_size, kv_part = config.num_key_value_heads * config.head_dim, shard.make_kv_part(config.num_key_value_heads)
        self.q_proj = ShardedLinear(config.hidden_size, config.hidden_size, shard.make_part(0), bias=True)
        self.k_proj = ShardedLinear(config.hidden_size, kv_size, kv_part, bias=True)
        self.v_proj = ShardedLinear(config.hidden_size, kv_size, kv_part, bias=True)
        self.o_proj = ShardedLinear(config.hidden_size, config.hidden_size, shard.make_part(1))
        self.qkv = FusedRows(self.q_proj, self.k_proj, self.v_proj)


class GatedMLP(nn.Module):
    """The projections of the MLP; `DecoderLayer` applies them."""

    def __init__(self, config: LanguageConfig, shard: Shard) -> None:
        super().__init__()
        self.gate_proj = ShardedLinear(config.hidden_size, config.intermediate_size, shard.make_part(0))
        self.up_proj = ShardedLinear(config.hidden_size, config.intermediate_size, shard.make_part(0))
        self.down_proj = ShardedLinear(config.intermediate_size, config.hidden_size, shard.make_part(1))
        self.gate_up = FusedRows(self.gate_proj, self.up_proj)


class FusedRows:
    """Several linear layers with the same input, computed as one matrix product.

    `fuse` lays their parameters out as parts of one matrix: names and state dict stay those of the checkpoint, and no
    weight is stored twice. Before that, and in training, the matrix is concatenated for each product.
    """

    def __init__(self, *parts: nn.Linear) -> None:
        self._parts = parts
        self._stacked: Stacked | None = None

    def fuse(self) -> None:
        """Fuse the parameters in their present device and dtype; moving them later undoes it."""
        with torch.no_grad():
            weight, bias, scales = self._concatenate()
        self._stacked = lay_out(weight), bias, scales
        start = 0
        for part in self._parts:
            rows = slice(start, start + part.out_features)
            part.weight.data = self._stacked[0][rows]
            if bias is not None:
                part.bias.data = bias[rows]
            if scales is not None:
                set_scales(part, scales[rows])
            start = rows.stop

    def stack(self, kernels: LayerKernels) -> tuple[Matrix, Tensor | None]:
        """Return the matrix and the bias [out] of all parts, stacked along the outputs."""
        weight, bias, scales = self._stacked or self._concatenate()
        return make_matrix(weight, scales, kernels), bias

    def _concatenate(self) -> Stacked:
        weights: list[Tensor] = [part.weight for part in self._parts]
        biases: list[Tensor] = [part.bias for part in self._parts if part.bias is not None]
        scales = [scale for part in self._parts if (scale := get_scales(part)) is not None]
        return torch.cat(weights), torch.cat(biases) if biases else None, torch.cat(scales) if scales else None


Stacked = tuple[Tensor, Tensor | None, Tensor | None]
"""Weight [out, in], bias [out] and, if quantized, scales [out, 1] of several layers."""
