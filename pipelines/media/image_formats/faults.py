"""Explain in one sentence why an image cannot be decoded: unsupported, truncated, corrupt, too large, or no image."""

from __future__ import annotations

import io
import re
import struct

from PIL import Image, UnidentifiedImageError

from pipelines.media.image_formats.names import is_image, name_format

_PLUGINS = {  # our name of a format that Pillow decodes -> Pillow's
    **{name: name for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "AVIF", "ICO")},
    "WebP": "WEBP",
    "JPEG 2000": "JPEG2000",
    "netpbm": "PPM",
    "HEIC": "HEIF",
}
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|cannot handle|not installed|unknown (pixel mode|data organization|compression)|"
    r"unable to determine J2K image mode|unrecogni[sz]ed image mode",
    re.IGNORECASE,
)
_TRUNCATED = re.compile(r"truncated|eof|only got|not enough data", re.IGNORECASE)
# Built into every libtiff; others, such as WebP, only into some.
_TIFF_COMPRESSIONS = ("raw", "tiff_ccitt", "group3", "group4", "tiff_lzw", "tiff_jpeg", "jpeg", "tiff_adobe_deflate")
_TIFF_DECODER = "decoder error -2"  # libtiff's reason is not passed on


def explain_fault(error: Exception, data: bytes) -> str:
    """Return the reason for an exception that Pillow raised on `data`."""
    name = name_format(data)
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {str(error).partition(', could')[0]}"
    if isinstance(error, MemoryError):
        return f"too large: {name or 'the image'} of {len(data):,} bytes does not fit into memory"
    if isinstance(error, UnidentifiedImageError):
        if name not in _PLUGINS:
            return _explain_unknown(name, data)
        error = _find_cause(name, error, data)
    detail = _describe(error, name, data)
    kind = _classify(error, detail, data)
    size = "" if kind == "unsupported" else f" of {len(data):,} bytes"
    return f"{kind} {name or 'image'}{size}: {detail}"


def _explain_unknown(name: str | None, data: bytes) -> str:
    if name is None:
        return f"not an image in a known format: the data starts with {data[:16]!r}"
    if is_image(name):
        return f"unsupported format {name}: convert the file to JPEG or PNG"
    return f"not an image: the data is {'an' if name[0] in 'AH' else 'a'} {name}"


def _find_cause(name: str, error: Exception, data: bytes) -> Exception:
    """Return what the format's own plugin raises; `Image.open` only says that no plugin knows the file."""
    factory, _ = Image.OPEN[_PLUGINS[name]]
    try:
        factory(io.BytesIO(data), "")
    except Exception as cause:  # as in `Image.open`, almost any type
        inner = cause.__cause__
        # Of a mode that Pillow's table lacks, the outer exception says more than the missing key.
        return inner if isinstance(inner, Exception) and not isinstance(inner, KeyError) else cause
    return error


def _describe(error: Exception, name: str | None, data: bytes) -> str:
    detail = " ".join(str(error).split()) or type(error).__name__
    if name == "TIFF" and detail == _TIFF_DECODER:
        compression = str(Image.open(io.BytesIO(data)).info.get("compression"))
        if compression not in _TIFF_COMPRESSIONS:
            return f"the compression {compression} is not supported, or its data is damaged"
    return detail


def _classify(error: Exception, detail: str, data: bytes) -> str:
    is_short_riff = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") > len(data) - 8
    if is_short_riff or isinstance(error, EOFError) or _TRUNCATED.search(detail):
        return "truncated"
    if isinstance(error, IndexError | struct.error):  # the header ends too early, or one of its lengths is wrong
        return "truncated or corrupt"
    return "unsupported" if _UNSUPPORTED.search(detail) else "corrupt"
