"""Decode BMP files whose pixels are bit fields of any layout; Pillow knows the most frequent ones."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovis_model.wording import count_nouns
from pipelines.errors import MediaError

_BITFIELDS, _ALPHA_BITFIELDS = 3, 6  # values of the field "compression"
_MASKS_AT = 54  # inside the longer headers, after the shortest


class _Header(NamedTuple):
    pixels_at: int
    width: int
    height: int
    is_top_down: bool
    bits: int
    masks: tuple[int, ...]  # red, green, blue and, if it is used, alpha


def read_bitfields_size(data: bytes) -> tuple[int, int] | None:
    """Return (width_px, height_px) of a BMP whose pixels are bit fields, None of any other data."""
    header = _read_header(data)
    return (header.width, header.height) if header else None


def decode_bitfields(data: bytes) -> Image.Image:
    """Decode a BMP whose pixels are bit fields to an RGB or RGBA image. Raise MediaError if it is truncated."""
    header = _read_header(data)
    assert header is not None
    pixels = _read_pixels(data, header)
    channels = [_extract_channel(pixels, mask) for mask in header.masks]
    image = Image.fromarray(np.stack(channels, axis=-1))
    image.format = "BMP"
    return image if header.is_top_down else image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def _read_header(data: bytes) -> _Header | None:
    if data[:2] != b"BM" or len(data) < _MASKS_AT + 16:
        return None
    pixels_at, size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
    if size < 40 or bits not in (16, 32) or compression not in (_BITFIELDS, _ALPHA_BITFIELDS) or width < 1:
        return None
    *colours, alpha = struct.unpack_from("<4I", data, _MASKS_AT)
    has_alpha = alpha > 0 and (size >= 56 or compression == _ALPHA_BITFIELDS)
    masks = (*colours, alpha) if has_alpha else tuple(colours)
    return _Header(pixels_at, width, abs(height), height < 0, bits, masks) if height and all(masks) else None


def _read_pixels(data: bytes, header: _Header) -> NDArray[np.integer]:
    """Return uint16[H, W] or uint32[H, W] in the order of the file. Rows are padded to 4 bytes."""
    per_row = (header.width * header.bits + 31) // 32 * 32 // header.bits
    count, missing = per_row * header.height, 0
    missing = header.pixels_at + count * header.bits // 8 - len(data)
    if missing > 0:
        lack = count_nouns(missing, "byte of its pixels is missing", "bytes of its pixels are missing")
        raise MediaError(f"truncated BMP of {len(data):,} bytes: {lack}")
    flat = np.frombuffer(data, f"<u{header.bits // 8}", count, header.pixels_at)
    return flat.reshape(header.height, per_row)[:, : header.width]


def _extract_channel(pixels: NDArray[np.integer], mask: int) -> NDArray[np.uint8]:
    """Return the values under a mask, scaled to 0..255."""
    shift = (mask & -mask).bit_length() - 1
    largest = mask >> shift
    values = (pixels & pixels.dtype.type(mask & (1 << pixels.itemsize * 8) - 1)) >> shift
    scaled: NDArray[np.uint8] = np.rint(values * np.float32(255 / largest)).astype(np.uint8)
    return scaled
