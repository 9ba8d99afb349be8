"""Keys and values of the rows that are being generated: one slot a row, rows of any length side by side."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ovis_model.attention import attend_cached, attend_causal
from ovis_model.config import LanguageConfig


class Memory(Protocol):
    """What a decoder layer attends to beside the tokens that it is given."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, T, heads, head_dim], twice [B, T, kv_heads, head_dim] -> [B, T, heads, head_dim]"""
        ...


class NoMemory:
    """Only the tokens that are given, each seeing those before it: training, and scoring a text in one pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_causal(query, key, value)


class KVCache:
    """keys, values: [layers, slots, capacity, kv_heads, head_dim]. Rows in use are the first slots, without a gap."""

    def __init__(
        self, config: LanguageConfig, *, slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, slots, capacity, config.num_key_value_heads, config.head_dim)
        # Zeros: a mask makes the weight of an unused place 0, and 0 times the NaN of stray memory is NaN.
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.slots, self.capacity = slots, capacity

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for store in (self.keys, self.values):
            store[:, target, :length] = store[:, source, :length]


class Prefill:
    """Prompts, padded on the right, into the slots `slots` (int64[B]) of a cache."""

    def __init__(self, cache: KVCache, slots: Tensor) -> None:
        self._cache, self._slots = cache, slots

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = key.shape[1]
        self._cache.keys[layer, self._slots, :length] = key
        self._cache.values[layer, self._slots, :length] = value
        return attend_causal(query, key, value)


class DecodeStep:
    """One more token for each of the first B slots, which hold `lengths` (int64[B]) tokens so far."""

    def __init__(self, cache: KVCache, lengths: Tensor, longest: int) -> None:
        rows, seen = len(lengths), longest + 1
        self._keys, self._values = cache.keys[:, :rows, :seen], cache.values[:, :rows, :seen]
        self._rows, self._at = torch.arange(rows, device=lengths.device), lengths
        self._lengths = (lengths + 1).int()
        self._mask = (torch.arange(seen, device=lengths.device) <= lengths[:, None])[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys[self._rows, self._at] = key[:, 0]
        values[self._rows, self._at] = value[:, 0]
        return attend_cached(query, keys, values, self._lengths, self._mask)


def bytes_per_token(config: LanguageConfig, dtype: torch.dtype) -> int:
    """Of keys and values, over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
