"""Make the context of a prefill of prompts of one length."""

from __future__ import annotations

import torch
from torch import Tensor

from ovis_model.engine.kv_cache import KVCache, Prefill
from ovis_model.network.attention import PackedSequences


def make_prefill(cache: KVCache, rows: int, width: int) -> tuple[Tensor, Prefill]:
    """Return the positions [1, rows * width] of prompts for the first slots, and their context."""
    device = cache.keys.device
    slots = torch.arange(rows, device=device).repeat_interleave(width, output_size=rows * width)
    positions = torch.arange(width, device=device).repeat(rows)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * width
    return positions[None], Prefill(cache, slots, positions, PackedSequences((width,) * rows, starts.diff(), starts))
