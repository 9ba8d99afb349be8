"""Decode the bytes of an image file, of any format that Pillow reads, to an upright RGB picture."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.errors import MediaError

MAX_PIXELS = 178_956_970  # 0.7 GB in memory; twice Pillow's MAX_IMAGE_PIXELS, where it refuses too

# Formats of pictures that Pillow decodes by itself: it hands EPS to Ghostscript, a program to run. The first
# five come loaded, the next imports all plugins, once. The last two have no signature and take what is left.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "ICO", "DIB", "TGA")
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "WebP": rb"RIFF....WEBP",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb"....ftypavi[fs]",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "netpbm": rb"P[1-6]\s",
}
# What convert("RGB") takes.
_MODES = ("RGB", "1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNINGS_LOCK = threading.Lock()


T = TypeVar("T")


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the RGB picture in `data`, upright; of an animation the first frame.

    EXIF orientation is applied, an unreadable EXIF block ignored. Alpha is dropped and the colour under it
    kept, as in the original. Of 16 bits the upper 8 are kept, as Pillow does for colour; float pixels count
    from 0 (black) to 1 (white). Threads of one process take turns.

    Raises MediaError for everything else: data that is damaged or no picture, more than `max_pixels` (before
    decoding), integers beyond 16 bits, floats beyond [0, 1].
    """
    if not data:
        raise MediaError("not an image: the data is empty")
    # Warnings are filtered for the whole process, hence the lock; a doubtful file is no news to a log.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _attempt(lambda: _decode_upright(data, max_pixels), data)


def _decode_upright(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if min(image.size) < 1:
        raise MediaError(f"empty image: {image.width} x {image.height} px")
    check_num_pixels(*image.size, max_pixels)
    if image.format == "WEBP" and getattr(image, "is_animated", False):
        check_num_pixels(*image.size, max_pixels // 8)  # its decoder holds the canvas several times
    image.load()
    turn = _turn(image, data)
    picture = _as_rgb(image)
    return picture if turn is None else picture.transpose(turn)


def _attempt(step: Callable[[], T], data: bytes) -> T:
    try:
        return step()
    except MediaError:
        raise
    except Exception as error:
        # All of them: on corrupt data Pillow's plugins raise whatever their parsing runs into (OSError,
        # SyntaxError, struct.error, zlib.error, IndexError, MemoryError ...); none of it may stop the run.
        raise MediaError(_reason(error, data)) from error


def _reason(error: Exception, data: bytes) -> str:
    name = next((name for name, start in _SIGNATURES.items() if re.match(start, data, re.DOTALL)), None)
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {str(error).partition(', could')[0]}"
    if isinstance(error, MemoryError):
        return f"too large: {name or 'the image'} of {len(data):,} bytes does not fit into memory"
    if isinstance(error, UnidentifiedImageError):
        if name is None:
            return _unknown(data)
        return f"truncated, corrupt or unsupported {name} of {len(data):,} bytes: its header cannot be read"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"{_fault(error, data)} {name or 'image'} of {len(data):,} bytes: {detail}"


def _fault(error: Exception, data: bytes) -> str:
    is_short_riff = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") > len(data) - 8
    is_short = any(hint in str(error).lower() for hint in ("truncated", "eof", "only got"))
    return "truncated" if is_short or is_short_riff or isinstance(error, EOFError) else "corrupt"


def _unknown(data: bytes) -> str:
    if re.match(rb"\s*<(!doctype html|html)", data, re.IGNORECASE):
        return "not an image: the data is an HTML page"
    return f"not an image in a supported format: the data starts with {data[:16]!r}"


def check_num_pixels(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise MediaError if a picture of this size is too large."""
    if width * height > max_pixels:
        raise MediaError(f"too large: {width:,} x {height:,} px are over the limit of {max_pixels:,} pixels")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_upper_byte(np.asarray(image)))
    elif image.mode == "I":
        image = Image.fromarray(_upper_byte(_within(np.asarray(image), 0, 65535)))
    elif image.mode == "F":
        image = Image.fromarray(np.rint(_within(np.asarray(image), 0, 1) * 255).astype(np.uint8))
    elif image.mode not in _MODES:
        raise MediaError(f"unsupported pixels: {image.format} in mode {image.mode}")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upper_byte(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    upper: NDArray[np.uint8] = (pixels >> 8).astype(np.uint8)
    return upper


def _within(pixels: NDArray[Any], low: int, high: int) -> NDArray[Any]:
    smallest, largest = pixels.min(), pixels.max()
    if not (low <= smallest and largest <= high):  # written so that NaN fails
        raise MediaError(
            f"unknown brightness scale: {pixels.dtype} pixels from {smallest} to {largest} "
            f"are not within {low} to {high}"
        )
    return pixels


def _turn(image: Image.Image, data: bytes) -> Image.Transpose | None:
    """Return the turn that EXIF asks for, once loaded: a PNG may hold EXIF after its pixels, a TIFF turns itself."""
    try:
        return _attempt(lambda: _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1)), data)
    except MediaError:
        return None
