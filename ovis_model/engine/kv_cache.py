"""Keep keys and values of running requests, one slot each, and let new tokens attend to them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ovis_model.config import LanguageConfig
from ovis_model.network.attention import choose_kernels


class KVCache:
    """Keys and values, each [layers, slots, capacity, kv_heads, head_dim].

    The slots in use are the first ones, without a gap.
    """

    def __init__(
        self, config: LanguageConfig, *, slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, slots, capacity, config.num_key_value_heads, config.head_dim)
        # Zeros: a mask gives unused positions the weight 0, but 0 times NaN in uninitialized memory is NaN.
        self.keys, self.values = (_allocate_zeros(shape, device, dtype) for _ in range(2))
        self.slots, self.capacity = slots, capacity
        self.attention_reads_lengths = choose_kernels(self.keys).reads_lengths

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for store in (self.keys, self.values):
            store[:, target, :length] = store[:, source, :length]


def _allocate_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Allocate zeros; on a CPU, pages take memory only once sequences use them."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Prefill:
    """The context of prompts, padded on the right, which are stored in `slots` (int64[B]) of a cache."""

    def __init__(self, cache: KVCache, slots: Tensor) -> None:
        self._cache, self._slots = cache, slots

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values; let each token see its prompt up to itself."""
        length = key.shape[1]
        self._cache.keys[layer, self._slots, :length] = key
        self._cache.values[layer, self._slots, :length] = value
        return choose_kernels(query).attend_causal(query, key, value)


class Extend:
    """The context of `width` new tokens per sequence, which follow the first `starts[b]` tokens of slot `sources[b]`.

    New tokens are padded on the right. Sequences may share a source, and no start is above `longest`. With `targets`,
    the source's tokens and the new ones are stored in slot `targets[b]`, which may be the source itself; without, the
    new tokens are not kept. `sources`, `starts` and `targets` are int64[B].
    """

    def __init__(
        self, cache: KVCache, sources: Tensor, starts: Tensor, longest: int, width: int, targets: Tensor | None = None
    ) -> None:
        self._cache, self._sources, self._targets = cache, sources, targets
        self._longest, self._lengths = longest, (starts + width).int()
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
        held[:, : self._longest] = store[self._sources, : self._longest]
        held[self._at] = new
        if self._targets is not None:
            length = min(held.shape[1], store.shape[1])  # the rest is padding
            store[self._targets, :length] = held[:, :length]


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


def compute_bytes_per_token(config: LanguageConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
