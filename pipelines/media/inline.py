"""Decode images and videos that a dataset holds as text: `data:` URIs and base64."""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from pipelines.media.readers import LongerThanAllowed, check_length

_SCHEME = "data:"
_MIN_CHARACTERS = 40  # the smallest GIF has 48 in base64
_START = re.compile(r"\s{0,64}([A-Za-z0-9+/_-]{16})")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|RIFF....(WEBP|AVI )|II[*+]\0|MM\0[*+]|BM....\0{4}|....ftyp|\0\0\0\x0c(jP  |JXL )|"
    rb"\xff\x4f\xff\x51|\x1a\x45\xdf\xa3",
    re.DOTALL,
)
_TO_STANDARD = str.maketrans("-_", "+/")  # from the alphabet for URLs


def is_inline(text: str) -> bool:
    """Return whether a text is a `data:` URI or the base64 of an image or a video, not a path or a URL.

    Base64 is recognized by the signature of a format; names of files have a suffix, and base64 has no ".".
    """
    if text[:5].lower() == _SCHEME:
        return True
    if len(text) < _MIN_CHARACTERS or (start := _START.match(text)) is None:
        return False
    return _SIGNATURE.match(_decode_base64(start[1])) is not None and _may_be_base64(text)


def _may_be_base64(text: str) -> bool:
    """Return whether a text is base64, or long and damaged only after its start, so that it is never shown."""
    match = _BASE64.match(text)
    return match is not None and (match.end() == len(text) or (match.end() >= _MIN_CHARACTERS and "." not in text))


def decode_inline(text: str, max_bytes: int) -> bytes:
    """Return the bytes that a `data:` URI, or else a text in base64, stands for.

    Raise LongerThanAllowed if they are more than `max_bytes`, and another OSError if the text is not valid.
    """
    try:
        if text[:5].lower() == _SCHEME:
            return check_length(_decode_uri(text, max_bytes), max_bytes)
        return check_length(_decode_bounded(text, max_bytes), max_bytes)
    except ValueError as error:
        raise OSError(f"{shorten_inline(text)!r} cannot be decoded: {error}") from error


def shorten_inline(text: str) -> str:
    """Return a text for display: a `data:` URI or base64 without its payload, any other text up to 80 characters."""
    if text[:5].lower() == _SCHEME:
        return f"{text[:80].partition(',')[0]},... ({len(text):,} characters)"
    shown = 16 if is_inline(text) else 80
    return text if len(text) <= shown else f"{text[:shown]}... ({len(text):,} characters)"


def _decode_uri(uri: str, max_bytes: int) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError("a data: URI needs a comma before its data")
    if not header.rstrip().lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    return _decode_bounded(unquote_to_bytes(payload).decode("latin-1") if "%" in payload else payload, max_bytes)


def _decode_bounded(text: str, max_bytes: int) -> bytes:
    if (num_bytes := len(text) * 3 // 4 - 2) > max_bytes:
        raise LongerThanAllowed(num_bytes)
    if not (data := _decode_base64(text)):
        raise ValueError("it holds no data")
    return data


def _decode_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, with or without padding. Raise ValueError if it is invalid."""
    packed = "".join(text.split()).translate(_TO_STANDARD).rstrip("=")
    return binascii.a2b_base64(packed + "=" * (-len(packed) % 4), strict_mode=True)
