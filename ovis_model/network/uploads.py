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
    tensors = [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]
    num_bytes = sum(map(_count_aligned_bytes, tensors))
    packed = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(_divide(packed, tensors), tensors, strict=True):
        part.copy_(tensor)
    return list(_divide(packed.to(device, non_blocking=True), tensors))


def _divide(packed: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the parts of uint8[n] as tensors of the dtypes and shapes of `like`."""
    start = 0
    for tensor in like:
        yield packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _count_aligned_bytes(tensor)


def _count_aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
