"""Scaled dot-product attention: one function per shape of the work, with interchangeable kernels.

In half precision on CUDA the kernels come from flash-attn if it is installed, else from torch's own FlashAttention.
Everywhere else torch's `scaled_dot_product_attention` runs. OVIS_ATTENTION=flash, varlen or sdpa overrides the choice.
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
    """What the new tokens of a decoder layer attend to: each other and, e.g., a cache of earlier tokens."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with queries [B, T, heads, head_dim] to the context and to new keys and values.

        Keys and values are [B, T, kv_heads, head_dim]; the result has the shape of the queries.
        """
        ...


class NoContext:
    """No earlier tokens, for training and for scoring a text in one pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let each token see itself and the tokens before it."""
        return choose_kernels(query).attend_causal(query, key, value)


_MASK_VALUES = 1 << 22
"""Maximum size of a mask of several new tokens over a cache: 16 MB in float32, however long prompts are."""


class Kernels(Protocol):
    """One implementation. Queries and results are [B, T, heads, head_dim], keys and values [B, S, kv_heads, head_dim].

    `lengths` (int32[B]) are numbers of keys: sequence b has only the first `lengths[b]` of its S keys. Sequences may be
    padded on the right; no token before the padding sees it.
    """

    reads_lengths: bool  # `attend_cached` reads no position beyond a sequence's length

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let every query see every key; queries and keys have the same number of heads."""
        ...

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let each query see the keys up to its own position."""
        ...

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Let the newest token (T = 1) of each sequence see the whole sequence.

        mask: the same information as `lengths`, for kernels that need it: bool[B, 1, 1, S], or 0 and -inf to add to the
        scores.
        """
        ...

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Let each of the newest T tokens of a sequence see the keys up to its own position; its key is among them."""
        ...


class Sdpa:
    """Torch's `scaled_dot_product_attention`, for every device and dtype."""

    reads_lengths = False

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run without a mask."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run with torch's causal flag instead of a mask."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Run with `mask`; `lengths` is unused."""
        batch, _, heads, head_dim = query.shape
        # The queries that share a key head are laid out as its time steps, so that no key is repeated.
        grouped = query.view(batch, keys.shape[2], heads // keys.shape[2], head_dim)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(batch, 1, heads, head_dim)

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Run in chunks of new tokens, each with a mask of at most `_MASK_VALUES`."""
        (batch, width, heads, head_dim), (places, kv_heads) = query.shape, keys.shape[1:3]
        groups = heads // kv_heads
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        at, place = (torch.arange(n, device=query.device) for n in (width, places))
        last = lengths[:, None] - width + at  # [B, T]: the position of each query
        step = max(1, _MASK_VALUES // (batch * groups * places))
        parts = []
        for part, own in zip(torch.split(query, step, 1), torch.split(last, step, 1), strict=True):
            # As in `attend_cached`, the queries that share a key head are laid out as its time steps.
            grouped = part.view(batch, -1, kv_heads, groups, head_dim).transpose(1, 2).flatten(2, 3)
            mask = (place <= own[..., None]).repeat_interleave(groups, 1)[:, None]
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
            parts.append(out.view(batch, kv_heads, -1, groups, head_dim).transpose(1, 2).flatten(2, 3))
        return torch.cat(parts, 1)


class Varlen(Sdpa):
    """Torch's FlashAttention for sequences of different lengths. Without a mask `Sdpa` runs the same kernel."""

    reads_lengths = True

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Run with `lengths`; `mask` is unused."""
        return self._attend(query, keys, values, lengths, (-1, -1))

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Run with `lengths`, without a mask in memory."""
        return self._attend(query, keys, values, lengths, (-1, 0))  # causal, aligned to the last key in use

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
        """Call `flash_attn_func`."""
        return self._attend(query, key, value)

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Call `flash_attn_func` with its causal flag."""
        return self._attend(query, key, value, causal=True)

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Call `flash_attn_with_kvcache`; `mask` is unused."""
        return self._attend_cache(query, keys, values, cache_seqlens=lengths)

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Call `flash_attn_with_kvcache` with its causal flag, aligned to the last key in use."""
        return self._attend_cache(query, keys, values, cache_seqlens=lengths, causal=True)


def choose_kernels(like: Tensor) -> Kernels:
    """Return the fastest kernels for the device and dtype of `like`; on CUDA, OVIS_ATTENTION overrides them."""
    return _find_kernels(like.is_cuda and like.dtype != torch.float32)


@cache
def _find_kernels(is_half_on_cuda: bool) -> Kernels:
    found, name = list_kernels(is_half_on_cuda), os.environ.get("OVIS_ATTENTION")
    if name is None or not is_half_on_cuda:
        return next(iter(found.values()))
    if name not in found:
        raise ValueError(f"OVIS_ATTENTION={name} is not available here; use one of {', '.join(found)} or unset it")
    return found[name]


def list_kernels(is_half_on_cuda: bool) -> dict[str, Kernels]:
    """Return all kernels that can run here, by name, the fastest first."""
    found: dict[str, Kernels] = {}
    if is_half_on_cuda and importlib.util.find_spec("flash_attn"):
        found["flash"] = Flash()
    if is_half_on_cuda and importlib.util.find_spec("torch.nn.attention.varlen"):
        found["varlen"] = Varlen()
    return {**found, "sdpa": Sdpa()}
