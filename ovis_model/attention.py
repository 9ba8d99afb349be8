"""Scaled dot-product attention behind three functions, one for each shape of the work, whatever kernels compute it.

In half precision on CUDA the kernels are those of flash-attn where it is installed, else torch's own FlashAttention;
everywhere else torch's `scaled_dot_product_attention`. OVIS_ATTENTION=flash, varlen or sdpa chooses by hand.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def attend_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every query sees every key; all [B, T, heads, head_dim], so is the result."""
    return kernels(query).attend_all(query, key, value)


def attend_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A query sees the keys up to its own place: [B, T, heads, head_dim] over [B, T, kv_heads, head_dim].

    Rows may be padded on the right: nothing before the padding sees it.
    """
    return kernels(query).attend_causal(query, key, value)


def attend_cached(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """The newest token of each row over the row's own cache: [B, 1, heads, head_dim], also the result.

    keys, values: [B, S, kv_heads, head_dim], of which row b holds the first `lengths[b]` (int32[B]);
    mask: bool[B, 1, 1, S], or 0 and -inf to add to the scores, says the same to kernels that take one.
    """
    return kernels(query).attend_cached(query, keys, values, lengths, mask)


def reads_lengths(keys: Tensor) -> bool:
    """Whether `attend_cached` over caches like this one reads no place beyond a row's length."""
    return kernels(keys).reads_lengths


class Kernels(Protocol):
    reads_lengths: bool

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...
    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...
    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor: ...


class Sdpa:
    """torch's own, on every device and in every type."""

    reads_lengths = False

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        batch, _, heads, head_dim = query.shape
        # The queries that share a key head take the place of its time steps: no key is repeated for them.
        grouped = query.view(batch, keys.shape[2], heads // keys.shape[2], head_dim)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(batch, 1, heads, head_dim)


class Varlen(Sdpa):
    """torch's FlashAttention over rows of their own lengths. Without a mask `Sdpa` runs the same kernel."""

    reads_lengths = True

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        batch, places = keys.shape[:2]
        starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
        out: Tensor = varlen_attn(  # type: ignore[assignment]
            query.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            starts,
            starts * places,
            1,
            places,
            enable_gqa=True,
            seqused_k=lengths,
        )
        return out[:, None]


class Flash:
    """The flash-attn package."""

    reads_lengths = True

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(query, key, value)
        return out

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(query, key, value, causal=True)
        return out

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        from flash_attn import flash_attn_with_kvcache

        out: Tensor = flash_attn_with_kvcache(query, keys, values, cache_seqlens=lengths)
        return out


def kernels(like: Tensor) -> Kernels:
    """The best for tensors of this device and type, or on CUDA those that OVIS_ATTENTION names."""
    return _kernels(like.is_cuda and like.dtype != torch.float32)


@cache
def _kernels(is_half_on_cuda: bool) -> Kernels:
    found, name = available(is_half_on_cuda), os.environ.get("OVIS_ATTENTION")
    if name is None or not is_half_on_cuda:
        return next(iter(found.values()))
    if name not in found:
        raise ValueError(f"OVIS_ATTENTION={name} is not to be had here; use one of {', '.join(found)} or unset it")
    return found[name]


def available(is_half_on_cuda: bool) -> dict[str, Kernels]:
    """All that can run, the best first."""
    found: dict[str, Kernels] = {}
    if is_half_on_cuda and importlib.util.find_spec("flash_attn"):
        found["flash"] = Flash()
    if is_half_on_cuda and importlib.util.find_spec("torch.nn.attention.varlen"):
        found["varlen"] = Varlen()
    return {**found, "sdpa": Sdpa()}
