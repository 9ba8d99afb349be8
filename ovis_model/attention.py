"""Scaled dot-product attention behind one function, whatever kernel computes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class CausalPadding:
    """The T queries are the last of the S keys; row b sees keys from `left_pad[b]` up to the query itself.

    left_pad: int32[B]; mask: bool[B, 1, T, S] for kernels that take one, None where plain causal says the same.
    """

    left_pad: Tensor
    mask: Tensor | None

    @classmethod
    def prefill(cls, left_pad: Tensor, length: int) -> CausalPadding:
        """For T = S = `length`."""
        if not left_pad.any():
            return cls(left_pad, None)
        at = torch.arange(length, device=left_pad.device)
        seen = (at[None, :] <= at[:, None]) & (at[None, None, :] >= left_pad[:, None, None])
        # A query inside the padding would see nothing and its NaN would spread through zero weights: it sees itself.
        return cls(left_pad, (seen | torch.eye(length, dtype=torch.bool, device=at.device))[:, None])

    @classmethod
    def decode(cls, left_pad: Tensor, length: int) -> CausalPadding:
        """For T = 1, S = `length`."""
        at = torch.arange(length, device=left_pad.device)
        return cls(left_pad, (at[None, :] >= left_pad[:, None])[:, None, None])


def attend(query: Tensor, key: Tensor, value: Tensor, causal: CausalPadding | None = None) -> Tensor:
    """Attention of [B, H, T, D] queries over [B, Hkv, S, D] keys and values -> [B, H, T, D].

    `causal` None means that every query sees every key. Hkv must divide H (grouped queries). flash-attn computes it
    on CUDA in half precision where it is installed, torch's own kernels everywhere else.
    """
    if query.is_cuda and query.dtype != torch.float32 and (flash := _flash_attn()) is not None:
        return _attend_flash(flash, query, key, value, causal)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal.mask if causal else None,
        is_causal=causal is not None and causal.mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_flash(flash: Any, query: Tensor, key: Tensor, value: Tensor, causal: CausalPadding | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, H, D]
    if causal is None:
        out: Tensor = flash.flash_attn_func(q, k, v)
    else:
        lengths = torch.full_like(causal.left_pad, k.shape[1])
        out = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, cache_leftpad=causal.left_pad, causal=True)
    return out.transpose(1, 2)


@cache
def _flash_attn() -> Any | None:
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn
