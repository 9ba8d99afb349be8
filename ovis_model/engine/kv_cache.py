"""Keep keys and values of running requests, one slot each, and let new tokens attend to them."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovis_model.config import LanguageConfig
from ovis_model.network.attention import AttentionContext, PackedSequences, PagedLengths, choose_kernels
from ovis_model.network.uploads import upload

Index = tuple[Tensor, Tensor | slice]
"""Where tokens are in the keys and values of one layer."""


class KVCache:
    """Keys and values, each [layers, slots, capacity, kv_heads, head_dim].

    The slots in use are the first ones, without a gap.
    """

    def __init__(
        self, config: LanguageConfig, *, slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.slots, self.capacity = slots, capacity
        # Zeros: a mask gives unused positions the weight 0, but 0 times NaN in uninitialized memory is NaN.
        self.keys, self.values = (_allocate_zeros(self._shape(config), device, dtype) for _ in range(2))
        self.attention_reads_lengths = choose_kernels(self.keys).reads_lengths

    def _shape(self, config: LanguageConfig) -> tuple[int, ...]:
        return config.num_hidden_layers, self.slots, self.capacity, config.num_key_value_heads, config.head_dim

    def locate(self, slots: Tensor, length: int) -> Index:
        """Return where the first `length` tokens of `slots` (int64[B]) are."""
        return slots, slice(length)

    def locate_tokens(self, slots: Tensor, positions: Tensor) -> Index:
        """Return where the tokens at `positions` of `slots` are, both int64[n]."""
        return slots, positions

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for store in (self.keys, self.values):
            store[:, target, :length] = store[:, source, :length]

    def set_table(self, table: NDArray[np.int32]) -> None:
        """Raise AssertionError: only a paged cache has a table."""
        raise AssertionError("a cache of slots has no pages")

    def begin_step(self, lengths: Tensor, longest: int) -> AttentionContext:
        """Return the context of one new token per sequence, in the first slots; see `DecodeStep`."""
        return DecodeStep(self, lengths, longest)


class PagedKVCache(KVCache):
    """Keys and values in pages, each [layers, 1 + pages, page_tokens, kv_heads, head_dim].

    `table` (int32[slots, pages of one sequence]) says which pages a slot has. Page 0 belongs to no slot: what padding
    writes goes there, and unused entries of the table are 0.
    """

    def __init__(
        self,
        config: LanguageConfig,
        pages: int,
        page_tokens: int,
        *,
        slots: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._pages, self.page_tokens = pages, page_tokens
        super().__init__(config, slots=slots, capacity=capacity, device=device, dtype=dtype)
        self.table = torch.zeros(slots, -(-capacity // page_tokens), dtype=torch.int32, device=device)

    def _shape(self, config: LanguageConfig) -> tuple[int, ...]:
        return config.num_hidden_layers, 1 + self._pages, self.page_tokens, config.num_key_value_heads, config.head_dim

    def locate(self, slots: Tensor, length: int) -> Index:
        """Return where the first `length` tokens of `slots` (int64[B]) are."""
        places = torch.arange(length, device=slots.device)
        return self.table[slots[:, None], places // self.page_tokens].long(), places % self.page_tokens

    def locate_tokens(self, slots: Tensor, positions: Tensor) -> Index:
        """Return where the tokens at `positions` of `slots` are, both int64[n]."""
        return self.table[slots, positions // self.page_tokens].long(), positions % self.page_tokens

    def move(self, source: int, target: int, length: int) -> None:
        """Do nothing: the table that follows gives the pages of `source` to `target`."""

    def set_table(self, table: NDArray[np.int32]) -> None:
        """Take the pages of each slot, int32[slots, n], in place."""
        [uploaded] = upload(self.table.device, table)
        self.table.copy_(uploaded)

    def begin_step(self, lengths: Tensor, longest: int) -> AttentionContext:
        """Return the context of one new token per sequence, in the first slots; see `PagedDecodeStep`."""
        return PagedDecodeStep(self, lengths, longest)


def _allocate_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Allocate zeros; on a CPU, pages take memory only once sequences use them."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Prefill:
    """The context of prompts that stand next to each other in one row of tokens.

    Token i is stored at `positions[i]` of slot `slots[i]` of a cache; both are int64[tokens].
    """

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor, sequences: PackedSequences) -> None:
        self._cache, self._at, self._sequences = cache, cache.locate_tokens(slots, positions), sequences

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values; let each token see its prompt up to itself."""
        self._cache.keys[layer][self._at] = key[0]
        self._cache.values[layer][self._at] = value[0]
        return choose_kernels(query).attend_packed(query, key, value, self._sequences)


class Extend:
    """The context of `width` new tokens per sequence, which follow the first `starts[b]` tokens of slot `sources[b]`.

    New tokens are padded on the right. Sequences may share a source, and no start is above `longest`. With `targets`,
    the source's tokens and the new ones are stored in slot `targets[b]`, which may be the source itself; without, the
    new tokens are not kept. `sources`, `starts` and `targets` are int64[B].
    """

    def __init__(
        self, cache: KVCache, sources: Tensor, starts: Tensor, longest: int, width: int, targets: Tensor | None = None
    ) -> None:
        self._cache, self._longest, self._lengths = cache, longest, (starts + width).int()
        self._from = cache.locate(sources, longest)
        self._num_kept = min(longest + width, cache.capacity)  # the rest is padding
        self._to = None if targets is None else cache.locate(targets, self._num_kept)
        shape = (len(sources), longest + width, *cache.keys.shape[3:])
        self._keys, self._values = (cache.keys.new_zeros(shape) for _ in range(2))
        rows, places = (torch.arange(n, device=starts.device) for n in (len(sources), width))
        self._at = rows[:, None], starts[:, None] + places

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Copy the source's keys and values, add the new ones, and let each token see those up to itself."""
        self._put(self._keys, self._cache.keys[layer], key)
        self._put(self._values, self._cache.values[layer], value)
        return choose_kernels(query).attend_extended(query, self._keys, self._values, self._lengths)

    def _put(self, held: Tensor, store: Tensor, new: Tensor) -> None:
        held[:, : self._longest] = store[self._from]
        held[self._at] = new
        if self._to is not None:
            store[self._to] = held[:, : self._num_kept]


class DecodeStep:
    """The context of one new token per sequence, in the first B slots.

    The slots hold `lengths` (int64[B]) tokens, each at most `longest`.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, longest: int) -> None:
        rows, seen = len(lengths), longest + 1
        self._keys, self._values = (store[:, :rows, :seen].unbind() for store in (cache.keys, cache.values))
        self._at = torch.arange(rows, device=lengths.device)[:, None], lengths[:, None]
        self._lengths = (lengths + 1).int()
        places = torch.arange(seen, device=lengths.device)
        unseen = (places > lengths[:, None])[:, None, None]
        # Added to the scores. From a mask of bools, the kernel would compute this again in every layer.
        self._mask = torch.zeros(unseen.shape, dtype=cache.keys.dtype, device=unseen.device)
        self._mask.masked_fill_(unseen, -math.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new key and value of each sequence; let its query see the whole sequence."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_put_(self._at, key)
        values.index_put_(self._at, value)
        return choose_kernels(query).attend_cached(query, keys, values, self._lengths, self._mask)


class PagedDecodeStep:
    """The context of one new token per sequence, in the first B slots of a paged cache.

    The slots hold `lengths` (int64[B]) tokens, each at most `longest`.
    """

    def __init__(self, cache: PagedKVCache, lengths: Tensor, longest: int) -> None:
        self._cache = cache
        table = cache.table[: len(lengths), : longest // cache.page_tokens + 1]
        self._pages = PagedLengths.build((lengths + 1).int(), table)
        page = table.gather(1, (lengths // cache.page_tokens)[:, None])
        self._at = page.long(), (lengths % cache.page_tokens)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new key and value of each sequence; let its query see the whole sequence."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_put_(self._at, key)
        values.index_put_(self._at, value)
        return choose_kernels(query).attend_paged(query, keys, values, self._pages)


def compute_bytes_per_token(config: LanguageConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
