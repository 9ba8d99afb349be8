"""Decode the bytes of an image file in one of Pillow's formats to an upright RGB image."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipelines.errors import MediaError
from pipelines.media.image_formats.avif import merge_property_boxes
from pipelines.media.image_formats.bitmaps import decode_bitfields, read_bitfields_size
from pipelines.media.image_formats.extras import decode_jpegxl, open_heic, read_jpegxl_size
from pipelines.media.image_formats.faults import explain_fault
from pipelines.media.image_formats.fresh_memory import fill_new_memory
from pipelines.media.image_formats.names import name_format
from pipelines.media.image_formats.partial import decode_partially, spread_passes

MAX_PIXELS = 178_956_970  # 0.7 GB in memory; twice Pillow's MAX_IMAGE_PIXELS, beyond which Pillow raises too

# Formats that Pillow decodes without another program: EPS needs Ghostscript. Pillow loads the first five at
# import; the others make it import all plugins, once. DIB and TGA have no signature, so they come last.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "ICO", "DIB", "TGA")
# Modes that convert("RGB") supports.
_MODES = ("RGB", "1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_BAND_PX = 256  # lines compared at once
_WARNINGS_LOCK = threading.Lock()

T = TypeVar("T")
Colour = tuple[int, int, int]
ChooseReduction = Callable[[int, int], int]
"""Return the factor, 1, 2, 4 or 8, by which an upright image of (width_px, height_px) may be reduced."""

_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB image. `format` is its name; `warning` says what is missing, or is "".

    size: (width_px, height_px) in the file; `pixels` are fewer if they were reduced.
    """

    pixels: Image.Image
    format: str
    warning: str = ""
    size: tuple[int, int] = (0, 0)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the upright RGB image in `data`; see `read_image`."""
    return read_image(data, max_pixels=max_pixels).pixels


def read_image(
    data: bytes,
    *,
    keep_partial: bool = False,
    background: Colour | None = None,
    max_pixels: int = MAX_PIXELS,
    choose_reduction: ChooseReduction | None = None,
) -> DecodedImage:
    """Return the upright RGB image in `data`, the first frame of an animation.

    EXIF orientation is applied; an unreadable EXIF block is ignored. Transparent pixels are drawn over `background`;
    without it, alpha is dropped and the colour under it kept, as in the original. 16-bit values keep their upper 8
    bits, as Pillow does for colour; float pixels range from 0 (black) to 1 (white). Threads of one process take turns.

    Raise MediaError for everything else: data that is damaged or not an image, more than `max_pixels` (checked
    before decoding), integers beyond 16 bits, floats outside [0, 1]. With `keep_partial`, the part of a damaged image
    that can be decoded is returned with a warning; the rest has the colour of the background, or white.
    With `choose_reduction`, a JPEG is decoded at a half, a quarter or an eighth of its size if that says so.
    """
    if not data:
        raise MediaError("not an image: the data is empty")
    # Warning filters are process-wide, hence the lock. Warnings about doubtful files would only fill the log.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _raise_media_errors(lambda: _decode_whole(data, background, max_pixels, choose_reduction), data)
        except MediaError as error:
            partial = _decode_part(data, background, max_pixels, str(error)) if keep_partial else None
            if partial is None:
                raise
            return partial


def _decode_whole(
    data: bytes, background: Colour | None, max_pixels: int, choose_reduction: ChooseReduction | None
) -> DecodedImage:
    image = _open_bounded(data, max_pixels)
    size = None
    if choose_reduction is not None and image.format == "JPEG":
        size = image.size
        _reduce(image, choose_reduction, is_turned=_read_transpose(image, data) in _QUARTER_TURNS)
    image = _load(image, data, max_pixels)
    return _finish(image, _convert_to_rgb(image, background), data, size=size)


def _reduce(image: Image.Image, choose_reduction: ChooseReduction, *, is_turned: bool) -> None:
    """Let libjpeg decode the image at a fraction of its size: its cosine transforms are cut short."""
    factor = choose_reduction(*(image.size[::-1] if is_turned else image.size))
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))


def _decode_part(data: bytes, background: Colour | None, max_pixels: int, reason: str) -> DecodedImage | None:
    """Return the part of the image that can be decoded; None if there is none, or only one colour."""
    with suppress(MediaError):
        image, known = _raise_media_errors(
            lambda: decode_partially(data, lambda data: _open_bounded(data, max_pixels)), data
        )
        pixels = np.array(_convert_to_rgb(image, background))
        if _has_several_colours(pixels[known]):
            shown = spread_passes(pixels, known) if image.info.get("interlace") else known
            pixels[~shown] = background or _WHITE
            warning = f"partial image, {known.mean():.0%} of its pixels: {reason}"
            return _finish(image, Image.fromarray(pixels), data, warning)
    return None


def _has_several_colours(pixels: NDArray[np.uint8]) -> bool:
    """Return whether uint8[N, 3] holds two colours or more: one alone is mostly what a decoder makes of no data."""
    return bool(len(pixels) and (pixels != pixels[0]).any())


def _finish(
    image: Image.Image, rgb: Image.Image, data: bytes, warning: str = "", *, size: tuple[int, int] | None = None
) -> DecodedImage:
    transpose = _read_transpose(image, data)
    upright = rgb if transpose is None else rgb.transpose(transpose)
    stored = size or rgb.size
    upright_size = stored[::-1] if transpose in _QUARTER_TURNS else stored
    return DecodedImage(upright, name_format(data) or image.format or "", warning, upright_size)


def _open_bounded(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header and check the size. Raise any exception if the image cannot be decoded."""
    image = _open(data, max_pixels)
    if min(image.size) < 1:
        raise MediaError(f"empty image: {image.width} x {image.height} px")
    check_num_pixels(*image.size, max_pixels)
    if image.format == "WEBP" and getattr(image, "is_animated", False):
        check_num_pixels(*image.size, max_pixels // 8)  # the decoder holds the canvas several times
    return image


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header, and also the pixels where only a whole image can be decoded. Raise any exception."""
    match name_format(data):
        case "JPEG XL":
            check_num_pixels(*read_jpegxl_size(data), max_pixels)
            return decode_jpegxl(data)
        case "HEIC":
            return open_heic(data)
        case "AVIF":
            data = merge_property_boxes(data)
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except OSError:
        if not (size := read_bitfields_size(data)):
            raise
        check_num_pixels(*size, max_pixels)
        return decode_bitfields(data)


def _load(image: Image.Image, data: bytes, max_pixels: int) -> Image.Image:
    """Decode the pixels. Raise MediaError if a TIFF leaves some of them undefined, so that they differ in each try.

    libtiff does so without an error, e.g. where a strip of JPEG has fewer lines than the header says.
    """
    if not any(tile[0] == "libtiff" for tile in getattr(image, "tile", ())):
        image.load()
        return image
    with fill_new_memory(0x55):
        image.load()
    again = _open(data, max_pixels)
    with fill_new_memory(0xAA):
        again.load()
    if not _are_equal(image, again):
        raise MediaError(f"corrupt TIFF of {len(data):,} bytes: some of its pixels are not in the file")
    return image


def _are_equal(one: Image.Image, other: Image.Image) -> bool:
    bands = [(0, top, one.width, min(top + _BAND_PX, one.height)) for top in range(0, one.height, _BAND_PX)]
    return all(one.crop(band).tobytes() == other.crop(band).tobytes() for band in bands)


def _raise_media_errors(step: Callable[[], T], data: bytes) -> T:
    try:
        return step()
    except MediaError:
        raise
    except Exception as error:
        # Every exception: on corrupt data Pillow's plugins raise almost any type (OSError, SyntaxError,
        # struct.error, zlib.error, IndexError, MemoryError ...), and none of them may stop the run.
        raise MediaError(explain_fault(error, data)) from error


def check_num_pixels(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise MediaError if an image of this size has too many pixels."""
    if width * height > max_pixels:
        raise MediaError(f"too large: {width:,} x {height:,} px are over the limit of {max_pixels:,} pixels")


def _convert_to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_take_upper_byte(np.asarray(image)))
    elif image.mode == "I":
        image = Image.fromarray(_take_upper_byte(_check_range(np.asarray(image), 0, 65535)))
    elif image.mode == "F":
        image = Image.fromarray(np.rint(_check_range(np.asarray(image), 0, 1) * 255).astype(np.uint8))
    elif image.mode not in _MODES:
        raise MediaError(f"unsupported pixel format: {image.format} in mode {image.mode}")
    if background is not None and image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _take_upper_byte(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    upper: NDArray[np.uint8] = (pixels >> 8).astype(np.uint8)
    return upper


def _check_range(pixels: NDArray[Any], low: int, high: int) -> NDArray[Any]:
    smallest, largest = pixels.min(), pixels.max()
    if not (low <= smallest and largest <= high):  # NaN fails this comparison
        raise MediaError(
            f"unknown brightness scale: {pixels.dtype} pixels from {smallest} to {largest} "
            f"are not within {low} to {high}"
        )
    return pixels


def _read_transpose(image: Image.Image, data: bytes) -> Image.Transpose | None:
    """Return the transpose for the EXIF orientation of a loaded image.

    Only load() reads EXIF after the pixels of a PNG, and it turns a TIFF, which must not be turned twice.
    """
    try:
        return _raise_media_errors(lambda: _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1)), data)
    except MediaError:
        return None
