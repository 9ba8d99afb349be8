"""Scaled dot-product attention: one function per shape of the work, with interchangeable kernels.

In half precision on CUDA the kernels come from flash-attn if it is installed, else from torch's own FlashAttention.
Everywhere else torch's `scaled_dot_product_attention` runs. OVIS_ATTENTION=flash, varlen or sdpa overrides the choice.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


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


PAGE_TOKENS = 256
"""Tokens of a page of a paged cache: the smallest page that FlashAttention 2 reads."""

_MASK_VALUES = 1 << 22
"""Maximum size of a mask of several new tokens over a cache: 16 MB in float32, however long prompts are."""


class PagedLengths(NamedTuple):
    """Where the sequences of a decode step are in a paged cache; the same in all layers.

    `lengths` (int32[B]) are numbers of keys. Position i of sequence b is in the page `table[b, i // page_tokens]`
    (int32[B, n]). `query_starts` and `key_starts` (int32[B + 1]) count the queries and keys before each sequence.
    """

    lengths: Tensor
    table: Tensor
    query_starts: Tensor
    key_starts: Tensor

    @classmethod
    def build(cls, lengths: Tensor, table: Tensor) -> PagedLengths:
        """Derive the counts from `lengths`."""
        query_starts = torch.arange(len(lengths) + 1, device=lengths.device, dtype=torch.int32)
        return cls(lengths, table, query_starts, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)))


class PackedSequences(NamedTuple):
    """Where sequences are that stand next to each other in one row of tokens, without padding.

    `sizes` are their lengths on the host, `lengths` (int32[B]) those on the device, and `starts` (int32[B + 1]) counts
    the tokens before each sequence.
    """

    sizes: tuple[int, ...]
    lengths: Tensor
    starts: Tensor

    @property
    def runs(self) -> Iterator[tuple[slice, int]]:
        """Where sequences of one length follow each other, and that length."""
        start = 0
        for size, run in groupby(self.sizes):
            stop = start + size * len(list(run))
            yield slice(start, stop), size
            start = stop


class Kernels(Protocol):
    """One implementation. Queries and results are [B, T, heads, head_dim], keys and values [B, S, kv_heads, head_dim].

    `lengths` (int32[B]) are numbers of keys: sequence b has only the first `lengths[b]` of its S keys. Sequences may be
    padded on the right; no token before the padding sees it.
    """

    reads_lengths: bool  # `attend_cached` reads no position beyond a sequence's length
    reads_pages: bool  # `attend_paged` reads the pages in place; otherwise it copies them

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let every query see every key; queries and keys have the same number of heads."""
        ...

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let each query see the keys up to its own position."""
        ...

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences) -> Tensor:
        """Let each query see the keys of its sequence up to its own position; B = 1, sequences share the row."""
        ...

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Let the newest token (T = 1) of each sequence see the whole sequence.

        mask: the same information as `lengths`, for kernels that need it: bool[B, 1, 1, S], or 0 and -inf to add to the
        scores.
        """
        ...

    def attend_paged(self, query: Tensor, keys: Tensor, values: Tensor, pages: PagedLengths) -> Tensor:
        """Let the newest token (T = 1) of each sequence see the whole sequence, whose keys and values are in pages.

        Keys and values are [pages, page_tokens, kv_heads, head_dim].
        """
        ...

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Let each of the newest T tokens of a sequence see the keys up to its own position; its key is among them."""
        ...


class Sdpa:
    """Torch's `scaled_dot_product_attention`, for every device and dtype."""

    reads_lengths = reads_pages = False

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run without a mask."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run with torch's causal flag instead of a mask."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences) -> Tensor:
        """Run each length apart: a mask over all tokens would make each query compute with all keys."""
        parts = [
            self.attend_causal(*(x[0, run].view(-1, size, *x.shape[2:]) for x in (query, key, value))).flatten(0, 1)
            for run, size in sequences.runs
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Run with `mask`; `lengths` is unused."""
        batch, _, heads, head_dim = query.shape
        # The queries that share a key head are laid out as its time steps, so that no key is repeated.
        grouped = query.view(batch, keys.shape[2], heads // keys.shape[2], head_dim)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(batch, 1, heads, head_dim)

    def attend_paged(self, query: Tensor, keys: Tensor, values: Tensor, pages: PagedLengths) -> Tensor:
        """Copy the pages of each sequence next to each other, then run with a mask."""
        k, v = (stored[pages.table.long()].flatten(1, 2) for stored in (keys, values))
        mask = (torch.arange(k.shape[1], device=k.device) < pages.lengths[:, None])[:, None, None]
        return self.attend_cached(query, k, v, pages.lengths, mask)

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


class CudaSdpa(Sdpa):
    """`Sdpa` on CUDA, where cuDNN runs only the passes whose shapes repeat: those over tiles.

    cuDNN builds a plan for each new shape and thread, which takes 55 ms to a second. Prompts have lengths of their own,
    so most of their passes would have a new shape.
    """

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run with torch's causal flag instead of a mask."""
        with _without_cudnn():
            return super().attend_causal(query, key, value)

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Run with `mask`; `lengths` is unused."""
        with _without_cudnn():
            return super().attend_cached(query, keys, values, lengths, mask)

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Run in chunks of new tokens."""
        with _without_cudnn():
            return super().attend_extended(query, keys, values, lengths)


def _without_cudnn() -> Any:
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Varlen(CudaSdpa):
    """Torch's FlashAttention for sequences of different lengths. Without a mask `Sdpa` runs the same kernel."""

    reads_lengths = True

    def __init__(self, attend: Callable[..., Any], *, reads_pages: bool) -> None:
        """Take a function like `varlen_attn` of torch 2.12, for fewer key heads than query heads."""
        self._call, self.reads_pages = attend, reads_pages

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences) -> Tensor:
        """Run with the starts and lengths of `sequences`."""
        longest = max(sequences.sizes)
        out: Tensor = self._call(
            query[0],
            key[0],
            value[0],
            sequences.starts,
            sequences.starts,
            longest,
            longest,
            window_size=(-1, 0),
            seqused_k=sequences.lengths,
        )
        return out[None]

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Run with `lengths`; `mask` is unused."""
        return self._attend(query, keys, values, lengths, (-1, -1))

    def attend_paged(self, query: Tensor, keys: Tensor, values: Tensor, pages: PagedLengths) -> Tensor:
        """Run with the table of `pages`.

        Keys are not split among blocks: torch's FlashAttention 2 sometimes returned NaN for split keys in pages
        (pytorch/pytorch#179760).
        """
        out: Tensor = self._call(
            query.flatten(0, 1),
            keys,
            values,
            pages.query_starts,
            pages.key_starts,
            1,
            pages.table.shape[1] * keys.shape[1],
            seqused_k=pages.lengths,
            block_table=pages.table,
            num_splits=1,
        )
        return out.view(query.shape)

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Run with `lengths`, without a mask in memory."""
        return self._attend(query, keys, values, lengths, (-1, 0))  # causal, aligned to the last key in use

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window_size: tuple[int, int]
    ) -> Tensor:
        (batch, width), stride = query.shape[:2], keys.stride(0) // keys.stride(1)
        starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
        out: Tensor = self._call(
            query.flatten(0, 1),
            _flatten_slots(keys),
            _flatten_slots(values),
            starts * width,
            starts * stride,
            width,
            keys.shape[1],
            window_size=window_size,
            seqused_k=lengths,
        )
        return out.view(query.shape)


def _flatten_slots(stored: Tensor) -> Tensor:
    """Return [B, S, ...] as [tokens, ...] without a copy, with the tokens between S and the end of each slot.

    The kernels read only what the lengths say, so the part of a cache beyond S need not be cut off by a copy.
    """
    batch, places, *rest = stored.shape
    stride = stored.stride(0) // stored.stride(1)
    return stored.as_strided(((batch - 1) * stride + places, *rest), stored.stride()[1:])


def _find_varlen() -> Varlen | None:
    """Return torch's FlashAttention as this release offers it.

    From 2.12, the public function takes fewer key heads than query heads, lengths and pages. The operator below it
    takes the first two since 2.11.
    """
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    names = set(inspect.signature(varlen_attn).parameters)
    if {"enable_gqa", "seqused_k"} <= names:
        return Varlen(partial(varlen_attn, enable_gqa=True), reads_pages={"block_table", "num_splits"} <= names)
    operator = _find_operator()
    if "seqused_k" in {argument.name for argument in operator.default._schema.arguments}:
        return Varlen(partial(_call_operator, operator), reads_pages=False)
    return None


def _find_operator() -> Any:
    return torch.ops.aten._flash_attention_forward


def _call_operator(
    operator: Callable[..., Any],
    *tensors_and_sizes: Any,
    window_size: tuple[int, int],
    seqused_k: Tensor,
) -> Tensor:
    """Call the operator below `varlen_attn` with the arguments of that function."""
    left, right = window_size
    out: tuple[Tensor, ...] = operator(
        *tensors_and_sizes,
        0.0,  # dropout
        window_size == (-1, 0),
        False,  # debug mask
        window_size_left=left,
        window_size_right=right,
        seqused_k=seqused_k,
    )
    return out[0]


class Flash:
    """The flash-attn package."""

    reads_lengths = reads_pages = True

    def __init__(self, package: Any) -> None:
        self._attend: Callable[..., Tensor] = package.flash_attn_func
        self._attend_varlen: Callable[..., Tensor] = package.flash_attn_varlen_func
        self._attend_cache: Callable[..., Tensor] = package.flash_attn_with_kvcache

    def attend_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Call `flash_attn_func`."""
        return self._attend(query, key, value)

    def attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Call `flash_attn_func` with its causal flag."""
        return self._attend(query, key, value, causal=True)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences) -> Tensor:
        """Call `flash_attn_varlen_func` with its causal flag."""
        starts, longest = sequences.starts, max(sequences.sizes)
        sizes = (starts, starts, longest, longest)
        return self._attend_varlen(query[0], key[0], value[0], *sizes, causal=True)[None]

    def attend_cached(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Call `flash_attn_with_kvcache`; `mask` is unused."""
        return self._attend_cache(query, keys, values, cache_seqlens=lengths)

    def attend_paged(self, query: Tensor, keys: Tensor, values: Tensor, pages: PagedLengths) -> Tensor:
        """Call `flash_attn_with_kvcache` with the table of `pages`."""
        return self._attend_cache(query, keys, values, cache_seqlens=pages.lengths, block_table=pages.table)

    def attend_extended(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Call `flash_attn_with_kvcache` with its causal flag, aligned to the last key in use."""
        return self._attend_cache(query, keys, values, cache_seqlens=lengths, causal=True)


def choose_kernels(like: Tensor) -> Kernels:
    """Return the fastest kernels for the device and dtype of `like`; on CUDA, OVIS_ATTENTION overrides them."""
    return _find_kernels(like.is_cuda, like.dtype != torch.float32)


def find_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest kernels for a device and dtype; on CUDA, OVIS_ATTENTION overrides them."""
    return _find_kernels(device.type == "cuda", dtype != torch.float32)


@cache
def _find_kernels(is_cuda: bool, is_half: bool) -> Kernels:
    found, name = list_kernels(is_cuda, is_half), os.environ.get("OVIS_ATTENTION")
    if name is None or not (is_cuda and is_half):
        return next(iter(found.values()))
    if name not in found:
        raise ValueError(f"OVIS_ATTENTION={name} is not available here; use one of {', '.join(found)} or unset it")
    return found[name]


def list_kernels(is_cuda: bool, is_half: bool) -> dict[str, Kernels]:
    """Return all kernels that can run here, by name, the fastest first.

    A kernel that fails on the device or computes something else is left out; its reason is printed.
    """
    if not is_cuda:
        return {"sdpa": Sdpa()}
    found: dict[str, Kernels] = {}
    for name, kernels in _list_half_kernels() if is_half else ():
        if torch.cuda.is_available() and (fault := find_fault(kernels, torch.device("cuda"), torch.bfloat16)):
            print(f"the attention kernels {name!r} are not used: {fault}", file=sys.stderr)
        else:
            found[name] = kernels
    return {**found, "sdpa": CudaSdpa()}


def _list_half_kernels() -> Iterator[tuple[str, Kernels]]:
    if (package := _import_flash_attn()) is not None:
        yield "flash", Flash(package)
    if (varlen := _find_varlen()) is not None:
        yield "varlen", varlen


def _import_flash_attn() -> Any:
    """Return the package flash-attn 2, or None. FlashAttention 4 installs a package of that name without these."""
    try:
        package = importlib.import_module("flash_attn")
    except ImportError:
        return None
    return package if hasattr(package, "flash_attn_with_kvcache") else None


@torch.inference_mode()
def find_fault(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run small decode steps and extensions; return why the kernels cannot be used, or None if they are correct."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    query, keys, values = draw(2, 3, 4, 64), draw(2, PAGE_TOKENS, 2, 64), draw(2, PAGE_TOKENS, 2, 64)
    lengths = torch.tensor([3, PAGE_TOKENS - 1], dtype=torch.int32)
    exact = _attend_in_each_way(Sdpa(), query, keys, values, lengths, with_pages=kernels.reads_pages)
    q, k, v = (x.to(device, dtype) for x in (query, keys, values))
    try:
        found = _attend_in_each_way(kernels, q, k, v, lengths.to(device), with_pages=kernels.reads_pages)
        error = max(float((a.cpu().float() - b).abs().max()) for a, b in zip(found, exact, strict=True))
    except (TypeError, RuntimeError, ValueError) as fault:
        return f"{type(fault).__name__}: {str(fault).splitlines()[0]}"
    return None if error < 0.05 else f"results differ from float32 by {error:.2f}"


def _attend_in_each_way(
    kernels: Kernels, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, with_pages: bool
) -> list[Tensor]:
    mask = (torch.arange(keys.shape[1], device=keys.device) < lengths[:, None])[:, None, None]
    newest = query[:, -1:].contiguous()
    q, k, v = (x.flatten(0, 1)[None, :5] for x in (query, keys[:, :3], values[:, :3]))
    places = torch.tensor([3, 2, 0, 3, 5], dtype=torch.int32, device=query.device)
    results = [
        kernels.attend_packed(q, k, v, PackedSequences((3, 2), places[:2], places[2:]))[0],
        kernels.attend_causal(query, keys[:, :3], values[:, :3]),
        kernels.attend_cached(newest, keys, values, lengths, mask),
        kernels.attend_extended(query, keys, values, lengths),
    ]
    if with_pages:  # each sequence is one page; their order is swapped
        table = torch.tensor([[1], [0]], dtype=torch.int32, device=keys.device)
        results.append(kernels.attend_paged(newest, keys, values, PagedLengths.build(lengths.flip(0), table)))
    return results
