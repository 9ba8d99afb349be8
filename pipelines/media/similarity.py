"""Find pictures that look alike, by a hash of their coarse brightness.

The hash is pHash (Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions): the signs of the
lowest frequencies, which survive another size, compression and brightness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_DISTANCE = 6  # different bits of 63; unrelated pictures differ in about half of them
_SIDE_PX, _NUM_FREQUENCIES = 32, 8
_LEAST_CONTRAST = 2.0  # of 255; below it, frequencies are noise


def hash_picture(picture: Image.Image) -> int:
    """Return a hash of 63 bits of a picture; 0 if it has one colour only."""
    small = picture.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX, reducing_gap=2.0)
    pixels = np.asarray(small.convert("L"), np.float64)
    if pixels.std() < _LEAST_CONTRAST:
        return 0
    frequencies = (_COSINES @ pixels @ _COSINES.T).ravel()[1:]  # without the mean
    return int.from_bytes(np.packbits(np.append(False, frequencies > np.median(frequencies))).tobytes(), "big")


def _make_cosines() -> NDArray[np.float64]:
    """Return float64[8, 32]: the lowest frequencies of a discrete cosine transform."""
    places = (np.arange(_SIDE_PX) + 0.5) / _SIDE_PX
    return np.cos(math.pi * np.arange(_NUM_FREQUENCIES)[:, None] * places)


_COSINES = _make_cosines()


def group_similar(hashes: Sequence[int]) -> list[int | None]:
    """Return the number of the group of each picture, from 0; None for those that no other looks like.

    The first picture of a group is its measure: all others are within MAX_DISTANCE of it, so no chain of small
    differences joins pictures that do not look alike.
    """
    known = np.array(hashes, np.uint64)
    groups: list[int | None] = [None] * len(known)
    is_free, number = np.ones(len(known), np.bool_), 0
    for place in range(len(known)):
        if not is_free[place]:
            continue
        near = np.flatnonzero(is_free & (_count_bits(known ^ known[place]) <= MAX_DISTANCE))
        if len(near) > 1:
            is_free[near] = False
            for one in near.tolist():
                groups[one] = number
            number += 1
    return groups


def _count_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Count the bits that are 1. numpy has a function for it only since version 2."""
    return _BITS_OF[values.view(np.uint16).reshape(-1, 4)].sum(axis=1)  # type: ignore[no-any-return]


_BITS_OF = np.array([value.bit_count() for value in range(1 << 16)])
