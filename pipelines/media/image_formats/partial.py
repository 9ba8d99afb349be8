"""Decode the part of a damaged image that its decoder reaches, as a browser shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

_HIGHEST = {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I": 65535, "F": 1}  # of the others: 255
_SEGMENTS = (b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd")  # those between the passes of a JPEG
_PASSES = (2, 4, 8)  # px between the pixels of earlier passes of an interlaced PNG

Mask = NDArray[np.bool_]


def decode_partially(data: bytes, open_image: Callable[[bytes], Image.Image]) -> tuple[Image.Image, Mask]:
    """Return the image in its own mode, and bool[H, W]: the pixels that are in the data.

    Raise any exception if the header cannot be read, or the format cannot be decoded in part. The caller must be the
    only user of Pillow in this process.
    """
    if open_image(data).info.get("progressive"):
        data = _drop_incomplete_segment(data)
    dark, light = (_load_on(open_image(data), is_light) for is_light in (False, True))
    known = _find_equal(np.asarray(dark), np.asarray(light))
    return dark, known


def spread_passes(pixels: NDArray[np.uint8], known: Mask) -> Mask:
    """Paint, in `pixels`, those of later passes of an interlaced PNG like the nearest one of an earlier pass.

    Return bool[H, W]: the known pixels and the painted ones.
    """
    rows, columns = (np.arange(length) for length in known.shape)
    painted = known.copy()
    for step in _PASSES:
        source = np.ix_(rows // step * step, columns // step * step)
        taken = ~painted & painted[source]
        pixels[taken] = pixels[source][taken]
        painted |= taken
    return painted


def _drop_incomplete_segment(data: bytes) -> bytes:
    """Cut a JPEG before a table or a header of a pass that it ends in: libjpeg would wait for the rest of it."""
    start = max(data.rfind(marker) for marker in _SEGMENTS)
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    return data[:start] if start >= 0 and start + 2 + max(2, length) > len(data) else data


def _load_on(image: Any, is_light: bool) -> Image.Image:
    """Decode onto a canvas of the lowest or the highest value, which stays where no pixel is decoded."""
    if not (tiles := getattr(image, "tile", ())) or any(tile[0] == "libtiff" for tile in tiles):
        raise OSError("this format is decoded as a whole")
    value = _HIGHEST.get(image.mode, 255) * is_light
    num_bands = Image.getmodebands(image.mode)
    colour: Any = value if num_bands == 1 else (value,) * num_bands
    canvas = Image.new(image.mode, image.size, colour)
    image.im = canvas.im
    if image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
        # Else Pillow ends the data with a mark at which libjpeg paints the missing lines grey.
        image.load_read = image.fp.read
    with _accept_damage():
        image.load()
    loaded: Image.Image = image
    return loaded


@contextmanager
def _accept_damage() -> Iterator[None]:
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _find_equal(one: NDArray[Any], other: NDArray[Any]) -> Mask:
    equal = np.asarray(one == other)
    return np.asarray(equal.all(axis=-1) if equal.ndim == 3 else equal, np.bool_)
