"""The preallocated keys and values of a batch of left-padded rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ovis_model.config import LanguageConfig


class KVCache:
    """keys, values: [layers, B, kv_heads, capacity, head_dim]; all rows hold `length` tokens, padding included."""

    def __init__(self, keys: Tensor, values: Tensor, length: int = 0) -> None:
        self._keys, self._values, self.length = keys, values, length

    @classmethod
    def allocate(
        cls, config: LanguageConfig, *, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def rows(self, start: int, stop: int) -> KVCache:
        """The same storage narrowed to some rows, with a length of its own."""
        return KVCache(self._keys[:, start:stop], self._values[:, start:stop], self.length)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, kv_heads, T, head_dim] after the tokens held -> all keys and values up to them.

        `length` moves when the caller has appended to every layer and adds T.
        """
        end = self.length + key.shape[2]
        self._keys[layer, :, :, self.length : end] = key
        self._values[layer, :, :, self.length : end] = value
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]


def bytes_per_token(config: LanguageConfig, dtype: torch.dtype) -> int:
    """Of keys and values, over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
