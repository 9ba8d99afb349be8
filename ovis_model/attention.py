"""Scaled dot-product attention behind three functions, one for each shape of the work, whatever kernel computes it.

flash-attn computes it on CUDA in half precision where it is installed, torch's own kernels everywhere else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def attend_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every query sees every key; all [B, T, heads, head_dim], so is the result."""
    if flash := _flash_attn(query):
        out: Tensor = flash.flash_attn_func(query, key, value)
        return out
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A query sees the keys up to its own place: [B, T, heads, head_dim] over [B, T, kv_heads, head_dim].

    Rows may be padded on the right: nothing before the padding sees it.
    """
    if flash := _flash_attn(query):
        out: Tensor = flash.flash_attn_func(query, key, value, causal=True)
        return out
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def attend_cached(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """The newest token of each row over the row's own cache: [B, 1, heads, head_dim], also the result.

    keys, values: [B, S, kv_heads, head_dim], of which row b holds the first `lengths[b]` (int32[B]);
    mask: bool[B, 1, 1, S] says the same to kernels that take one.
    """
    if flash := _flash_attn(query):
        out: Tensor = flash.flash_attn_with_kvcache(query, keys, values, cache_seqlens=lengths)
        return out
    batch, _, heads, head_dim = query.shape
    # The queries that share a key head take the place of its time steps: no key is repeated for them.
    grouped = query.view(batch, keys.shape[2], heads // keys.shape[2], head_dim)
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(batch, 1, heads, head_dim)


def _flash_attn(query: Tensor) -> Any | None:
    return _import_flash_attn() if query.is_cuda and query.dtype != torch.float32 else None


@cache
def _import_flash_attn() -> Any | None:
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn
