"""Count the arithmetic and the memory traffic of rows, and the least time that they take at given rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ovis_model.config import OvisConfig
from ovis_model.engine.kv_cache import compute_bytes_per_token


@dataclass(frozen=True)
class Ceilings:
    """The peak rates that the device reaches on large operations."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cost:
    """The work of rows with equal prompts; a multiply-add counts as two operations."""

    vision_flops: float
    prefill_flops: float
    decode_flops: float
    decode_bytes: float

    def compute_floor_s(self, ceilings: Ceilings) -> float:
        """Return the least seconds at these rates; decoding takes as long as its arithmetic or traffic, the slower."""
        decode_s = max(self.decode_flops / ceilings.flops_per_s, self.decode_bytes / ceilings.bytes_per_s)
        return (self.vision_flops + self.prefill_flops) / ceilings.flops_per_s + decode_s


def compute_cost(
    config: OvisConfig,
    dtype: torch.dtype,
    *,
    tiles: int,
    prompt: int,
    output_lengths: Sequence[int],
    slots: int,
    layer_bytes: int | None = None,
) -> Cost:
    """Compute the work of a run.

    Each row has `tiles` tiles and `prompt` tokens. `output_lengths` are the output tokens of each row; `slots` rows
    decode at the same time. Decoding takes as few steps as possible; each step reads the decoder's weights once, and
    the cache of each row. `layer_bytes` are those of a weight in the decoder's layers, if they have another dtype.
    """
    t, rows = config.language, len(output_lengths)
    layer, head = _count_layer_weights(config), t.hidden_size * t.vocab_size
    weights = t.num_hidden_layers * layer + head
    # Prefill yields the first token of a row.
    attended = sum((n - 1) * (prompt + n / 2) for n in output_lengths)
    tokens = sum(n - 1 for n in output_lengths)
    steps = max(max(output_lengths) - 1, tokens / slots)
    read = (weights - head) * (layer_bytes or dtype.itemsize) + head * dtype.itemsize
    attention = 2 * t.num_hidden_layers * t.hidden_size
    return Cost(
        vision_flops=2.0 * rows * tiles * _count_tile_multiply_adds(config),
        prefill_flops=2.0 * rows * (prompt * (weights - head) + head + attention * prompt**2 / 2),
        decode_flops=2.0 * (tokens * weights + attention * attended),
        decode_bytes=steps * read + attended * compute_bytes_per_token(t, dtype),
    )


def _count_layer_weights(config: OvisConfig) -> int:
    t = config.language
    kv_size = t.num_key_value_heads * t.head_dim
    return 2 * t.hidden_size**2 + 2 * t.hidden_size * kv_size + 3 * t.hidden_size * t.intermediate_size


def _count_tile_multiply_adds(config: OvisConfig) -> int:
    """Count a tile's multiply-adds: weights by patches or tokens, queries by keys, attention by values."""
    v = config.vision
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size + 2 * v.num_patches * v.hidden_size
    merged = v.hidden_size * v.hidden_stride**2
    head = v.tokens_per_tile * v.num_visual_words * (merged + config.language.hidden_size)
    return v.num_patches * (v.num_hidden_layers * block + 3 * v.patch_size**2 * v.hidden_size) + head
