"""Scaled dot-product attention: one function for each shape of the work, over interchangeable kernels.

In half precision on CUDA the kernels are those of flash-attn where it is installed, else torch's own FlashAttention;
everywhere else torch's `scaled_dot_product_attention`. OVIS_ATTENTION=flash, varlen or sdpa chooses by hand.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class AttentionContext(Protocol):
    """What a decoder layer attends to in addition to the tokens that it is given."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, T, heads, head_dim], twice [B, T, kv_heads, head_dim] -> [B, T, heads, head_dim]"""
        ...


class NoContext:
    """Only the given tokens, each seeing those before it: for training, and for scoring a text in one pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return choose_kernels(query).attend_causal(query, key, value)


_MASK_VALUES = 1 << 22
"""Of a mask that is made for several new tokens over a cache: 16 MB in float32, however long prompts are."""


class Kernels(Protocol):
    """One implementation. Queries and results are [B, T, heads, head_dim], keys and values [B, S, kv_heads, head_dim].

    Where rows have `lengths` (int32[B]), row b holds the first `lengths[b]` of its keys. Rows may be padded on the
    right: nothing before the padding sees it.
    """

    reads_lengths: bool  # `attend_cached` reads no place beyond a row's length

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let every query see every key, of as many heads."""
        ...

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let a query see the keys up to its own place."""
        ...

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Let the newest token (T = 1) of each row see all of the row.

        mask: bool[B, 1, 1, S], or 0 and -inf to add to the scores, says the same to kernels that take one.
        """
        ...

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Let the newest T tokens of each row, which are among its keys, see those up to their own places."""
        ...


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

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        (batch, width, heads, head_dim), (places, kv_heads) = query.shape, keys.shape[1:3]
        groups = heads // kv_heads
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        at, place = (torch.arange(n, device=query.device) for n in (width, places))
        last = lengths[:, None] - width + at  # [B, T]: the place of each query
        step = max(1, _MASK_VALUES // (batch * groups * places))
        parts = []
        for part, own in zip(torch.split(query, step, 1), torch.split(last, step, 1), strict=True):
            # As in `attend_cached`, the queries that share a key head follow each other in time.
            grouped = part.view(batch, -1, kv_heads, groups, head_dim).transpose(1, 2).flatten(2, 3)
            mask = (place <= own[..., None]).repeat_interleave(groups, 1)[:, None]
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
            parts.append(out.view(batch, kv_heads, -1, groups, head_dim).transpose(1, 2).flatten(2, 3))
        return torch.cat(parts, 1)


class Varlen(Sdpa):
    """torch's FlashAttention over rows of their own lengths. Without a mask `Sdpa` runs the same kernel."""

    reads_lengths = True

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        return self._attend(query, keys, values, lengths, (-1, -1))

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return self._attend(query, keys, values, lengths, (-1, 0))  # causal: the last query at the last key in use

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window_size: tuple[int, int]
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        batch, width, places = *query.shape[:2], keys.shape[1]
        starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
        out: Tensor = varlen_attn(  # type: ignore[assignment]
            query.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            starts * width,
            starts * places,
            width,
            places,
            window_size=window_size,
            enable_gqa=True,
            seqused_k=lengths,
        )
        return out.view(query.shape)


class Flash:
    """The flash-attn package."""

    reads_lengths = True

    def __init__(self) -> None:
        package = importlib.import_module("flash_attn")
        self._attend: Callable[..., Tensor] = package.flash_attn_func
        self._attend_cache: Callable[..., Tensor] = package.flash_attn_with_kvcache

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(query, key, value)

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(query, key, value, causal=True)

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        return self._attend_cache(query, keys, values, cache_seqlens=lengths)

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return self._attend_cache(query, keys, values, cache_seqlens=lengths, causal=True)


def choose_kernels(like: Tensor) -> Kernels:
    """The best for tensors of this device and type, or on CUDA those that OVIS_ATTENTION names."""
    return _find_kernels(like.is_cuda and like.dtype != torch.float32)


@cache
def _find_kernels(is_half_on_cuda: bool) -> Kernels:
    found, name = list_kernels(is_half_on_cuda), os.environ.get("OVIS_ATTENTION")
    if name is None or not is_half_on_cuda:
        return next(iter(found.values()))
    if name not in found:
        raise ValueError(f"OVIS_ATTENTION={name} is not to be had here; use one of {', '.join(found)} or unset it")
    return found[name]


def list_kernels(is_half_on_cuda: bool) -> dict[str, Kernels]:
    """All that can run, the best first."""
    found: dict[str, Kernels] = {}
    if is_half_on_cuda and importlib.util.find_spec("flash_attn"):
        found["flash"] = Flash()
    if is_half_on_cuda and importlib.util.find_spec("torch.nn.attention.varlen"):
        found["varlen"] = Varlen()
    return {**found, "sdpa": Sdpa()}
