"""Compute the least time that arithmetic and memory traffic allow, from rates measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ovis_model.config import OvisConfig
from ovis_model.engine.kv_cache import bytes_per_token


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches when nothing else is asked of it."""

    flops_per_s: float
    bytes_per_s: float


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The rate of a large matrix product, and of a large copy, read and written; the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s, copy_s = [], []
    for _ in range(6):
        product_s.append(_seconds(lambda: torch.mm(a, a), device))
        copy_s.append(_seconds(lambda: target.copy_(source), device))
    return Ceilings(2 * side**3 / min(product_s[1:]), 2 * source.numel() / min(copy_s[1:]))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


@dataclass(frozen=True)
class Cost:
    """Of rows with equal prompts: multiply-adds count as two operations."""

    vision_flops: float
    prefill_flops: float
    decode_flops: float
    decode_bytes: float

    def seconds(self, most: Ceilings) -> float:
        """A decode step can take no less than its arithmetic and no less than its traffic."""
        decode_s = max(self.decode_flops / most.flops_per_s, self.decode_bytes / most.bytes_per_s)
        return (self.vision_flops + self.prefill_flops) / most.flops_per_s + decode_s


def cost(
    config: OvisConfig, dtype: torch.dtype, *, tiles: int, prompt: int, lengths: Sequence[int], slots: int
) -> Cost:
    """`tiles` and `prompt` tokens a row; `lengths`: output tokens of each row, of which `slots` run side by side.

    Decoding reads the decoder's weights once a step, in as few steps as there can be, and every row its own cache.
    """
    t, rows = config.language, len(lengths)
    layer, head = _layer_weights(config), t.hidden_size * t.vocab_size
    weights = t.num_hidden_layers * layer + head
    # The first token of a row comes from its prompt.
    attended = sum((n - 1) * (prompt + n / 2) for n in lengths)
    tokens = sum(n - 1 for n in lengths)
    steps = max(max(lengths) - 1, tokens / slots)
    attention = 2 * t.num_hidden_layers * t.hidden_size
    return Cost(
        vision_flops=2.0 * rows * tiles * _tile_products(config),
        prefill_flops=2.0 * rows * (prompt * (weights - head) + head + attention * prompt**2 / 2),
        decode_flops=2.0 * (tokens * weights + attention * attended),
        decode_bytes=steps * weights * dtype.itemsize + attended * bytes_per_token(t, dtype),
    )


def _layer_weights(config: OvisConfig) -> int:
    t = config.language
    kv_size = t.num_key_value_heads * t.head_dim
    return 2 * t.hidden_size**2 + 2 * t.hidden_size * kv_size + 3 * t.hidden_size * t.intermediate_size


def _tile_products(config: OvisConfig) -> int:
    """Multiply-adds of a tile: weights by patches or tokens, queries by keys, attention by values."""
    v = config.vision
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size + 2 * v.num_patches * v.hidden_size
    merged = v.hidden_size * v.hidden_stride**2
    head = v.tokens_per_tile * v.num_visual_words * (merged + config.language.hidden_size)
    return v.num_patches * (v.num_hidden_layers * block + 3 * v.patch_size**2 * v.hidden_size) + head
