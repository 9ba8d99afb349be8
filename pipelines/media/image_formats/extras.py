"""Decode formats whose decoders are packages of an extra: HEIC by pillow-heif, JPEG XL by imagecodecs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import MediaError

_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}  # of width to height
_SIZE_BITS = (9, 13, 18, 30)  # of a side, chosen by two bits


def open_heic(data: bytes) -> Image.Image:
    """Return an image whose pixels are decoded by its `load`. Raise MediaError without the extra, else as Pillow."""
    try:
        import pillow_heif
    except ImportError as error:
        raise MediaError(_describe_missing("HEIC", "heif")) from error
    # Not thumbnails in place of the image; other cores decode other images.
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return Image.open(io.BytesIO(data), formats=("HEIF",))


def decode_jpegxl(data: bytes) -> Image.Image:
    """Decode the first frame, upright. Raise MediaError without the extra, else an exception of the library."""
    try:
        import imagecodecs
    except ImportError as error:
        raise MediaError(_describe_missing("JPEG XL", "jxl")) from error
    pixels = imagecodecs.jpegxl_decode(data, index=0, numthreads=1)
    image = Image.fromarray(_to_8_bits(pixels[..., :4] if pixels.ndim == 3 else pixels))
    image.format = "JXL"
    return image


def read_jpegxl_size(data: bytes) -> tuple[int, int]:
    """Return (width_px, height_px) from the header, before any orientation. Raise MediaError if there is none."""
    start = _find_codestream(data)
    if data[start : start + 2] != b"\xff\x0a":
        raise MediaError(f"corrupt JPEG XL of {len(data):,} bytes: its header cannot be read")
    bits = _Bits(int.from_bytes(data[start + 2 : start + 18], "little"))
    is_small = bits.read(1)
    height = _read_side(bits, is_small)
    if ratio := _RATIOS.get(bits.read(3)):
        return height * ratio[0] // ratio[1], height
    return _read_side(bits, is_small), height


def _describe_missing(name: str, extra: str) -> str:
    return f"unsupported format {name} without its extra: pip install 'ovis2-ray[{extra}]'"


def _to_8_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype != np.uint16:
        raise MediaError(f"unsupported JPEG XL: its pixels are {pixels.dtype}")
    upper: NDArray[np.uint8] = (pixels >> 8).astype(np.uint8)
    return upper


def _find_codestream(data: bytes) -> int:
    """Return where the image begins: at once, or in a box of a container."""
    start = 0
    while data[start : start + 2] != b"\xff\x0a" and start + 8 <= len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if kind in (b"jxlc", b"jxlp"):
            return start + (8 if kind == b"jxlc" else 12)  # a part has a number
        start += length if length >= 8 else len(data)
    return start


def _read_side(bits: _Bits, is_small: int) -> int:
    if is_small:
        return 8 * (bits.read(5) + 1)
    return bits.read(_SIZE_BITS[bits.read(2)]) + 1


class _Bits:
    """A number that is read from its lowest bit on."""

    def __init__(self, value: int) -> None:
        self._value = value

    def read(self, count: int) -> int:
        taken = self._value & ((1 << count) - 1)
        self._value >>= count
        return taken
