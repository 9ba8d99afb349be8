"""Hash columns of the manifest to 64 bits per row, without a Python loop."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_ROWS_AT_ONCE = 1 << 12
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_FACTOR, -1, 1 << 64)


def hash_texts(texts: pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return uint64[N]: the sum of a random number per byte times a power of its place, modulo 2**64, then mixed."""
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    parts = [chunk.slice(at, _ROWS_AT_ONCE) for chunk in chunks for at in range(0, len(chunk), _ROWS_AT_ONCE)]
    return np.concatenate([np.empty(0, np.uint64), *map(_hash_some, parts)])


def hash_places(images: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hash lists of references as the manifest stores them: the places of images, not sizes, which may change."""
    return np.concatenate([np.empty(0, np.uint64), *map(_hash_lists, images.chunks)])


def _hash_lists(lists: pa.ListArray) -> NDArray[np.uint64]:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    items = lists.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    offsets -= offsets[0]
    lengths = np.diff(offsets)
    hashes = _mix(np.arange(len(items), dtype=np.uint64) - np.repeat(offsets[:-1], lengths).astype(np.uint64))
    for name in ("kind", "uri", "offset", "member", "row"):
        column = items.field(name)
        numbers = column.to_numpy().astype(np.uint64) if pa.types.is_integer(column.type) else hash_texts(column)
        hashes = _mix(hashes * np.uint64(_FACTOR) + numbers)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes)])
    return _mix(sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64))


def combine_hashes(*columns: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one hash per row of several columns of hashes."""
    combined = columns[0]
    for column in columns[1:]:
        combined = _mix(combined * np.uint64(_FACTOR) + column)
    return combined


def _hash_some(texts: pa.Array) -> NDArray[np.uint64]:
    texts = texts.cast(pa.string())
    _, offsets_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    data = np.frombuffer(data_buffer, np.uint8)[first:last] if last > first else np.empty(0, np.uint8)
    powers, inverses = _compute_powers(_round_up(len(data) + 1))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_draw_numbers()[data] * powers[: len(data)], out=sums[1:])
    starts, stops = offsets[:-1] - first, offsets[1:] - first
    lengths = (stops - starts).astype(np.uint64)
    return _mix((sums[stops] - sums[starts]) * inverses[starts] + lengths)


def _round_up(size: int) -> int:
    return 1 << size.bit_length()


@lru_cache(1)
def _draw_numbers() -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, 1 << 64, 256, np.uint64)


@lru_cache(4)
def _compute_powers(size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the powers of the factor and of its inverse, from the 0th on."""
    factors = np.full((2, size), [[_FACTOR], [_INVERSE]], np.uint64)
    factors[:, 0] = 1
    powers, inverses = np.cumprod(factors, axis=1, dtype=np.uint64)
    return powers, inverses


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Let each bit depend on all bits, as in SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
