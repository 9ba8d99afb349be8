"""Copy arrays from the host to the device without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
"""Bytes at whose multiples the arrays of a copy begin; enough for every dtype."""


def upload(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    """Return `arrays` on the device, with their dtypes and shapes, by one copy.

    The copy is from pinned memory on CUDA, so that the host continues at once. Torch's allocator of pinned memory
    reuses a block only after the copies from it.
    """
    packed = torch.empty(count_bytes(arrays), dtype=torch.uint8, pin_memory=device.type == "cuda")
    pack(arrays, packed)
    return list(unpack(packed.to(device, non_blocking=True), arrays))


def count_bytes(arrays: Sequence[NDArray[Any]]) -> int:
    """Return the number of bytes that `pack` needs."""
    return sum(map(_count_aligned_bytes, arrays))


def pack(arrays: Sequence[NDArray[Any]], packed: Tensor) -> None:
    """Copy the arrays next to each other into uint8[n] of the host, which may be longer than needed."""
    buffer, start = packed.numpy(), 0
    for array in arrays:
        buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        start += _count_aligned_bytes(array)


def unpack(packed: Tensor, arrays: Sequence[NDArray[Any]]) -> Iterator[Tensor]:
    """Yield the parts of a packed uint8[n] with the dtypes and shapes of `arrays`."""
    start = 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        yield packed[start : start + array.nbytes].view(dtype).view(array.shape)
        start += _count_aligned_bytes(array)


def _count_aligned_bytes(array: NDArray[Any]) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
