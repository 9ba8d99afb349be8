"""Find the images that a JSON object names or holds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from pipelines.errors import SourceError
from pipelines.media.inline import is_inline, shorten_inline
from pipelines.media.reference import FileRef, ImageRef, InlineRef, resolve_path
from pipelines.sources.image_columns import choose_image_columns
from pipelines.sources.json_elements import Element
from pipelines.sources.kinds import IMAGE_SUFFIXES
from pipelines.storage import store

_BYTES_KEYS = ("bytes", "data", "base64")
_PATH_KEYS = ("path", "url", "uri", "image_url", "image", "file_name", "filename")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MAX_PATH_CHARACTERS = 8192
_MAX_REMOTE_CHECKS = 100  # per field; a request each


def get_images(uri: str, values: Mapping[str, Any], column: str | None) -> list[Any]:
    """Return what the row's column of images holds, as a list. Raise SourceError if several columns may be it."""
    if column is not None:
        return _to_list(values.get(column)) if column else []
    names = choose_image_columns(values)
    if len(names) > 1:
        raise SourceError(
            f"{store.redact(uri)}: {', '.join(names)} may all hold the images; choose the field with "
            "--image-column, or '' for none"
        )
    return _to_list(values[names[0]]) if names else []


def _to_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def make_reference(uri: str, image: Any, element: Element) -> ImageRef:
    """Refer to the file that `image` names, or to the text in the element that holds its bytes. Raise ValueError."""
    packed, text = None, image
    if isinstance(image, dict):
        packed = _get(image, _BYTES_KEYS)
        text = packed or _get(image, _PATH_KEYS)
    if isinstance(text, str) and text and (packed or is_inline(text)):
        at, num_bytes = _find_literal(element.data, text)
        is_gzip = store.strip_query(uri).lower().endswith(".gz")
        return InlineRef(uri, element.offset + at, num_bytes, is_gzip)
    if not isinstance(text, str) or not text or len(text) > _MAX_PATH_CHARACTERS:
        shown = shorten_inline(str(hide_inline(image)))
        raise ValueError(f"an image must be a path, a URI or the image in base64, not {shown!r}")
    return FileRef(resolve_path(text, uri))


def _get(image: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((image[key] for key in keys if image.get(key)), None)


def _find_literal(data: bytes, text: str) -> tuple[int, int]:
    """Return the offset and the length of a JSON string in `data` that stands for `text`."""
    literal = b'"' + text.encode() + b'"'
    if '"' not in text and "\\" not in text and (at := data.find(literal)) >= 0:
        return at, len(literal)
    return next(
        (match.start(), len(match[0])) for match in _STRING.finditer(data) if json.loads(match[0], strict=False) == text
    )


def hide_inline(value: Any) -> Any:
    """Return a value with every image in it that is text shortened, so that no column holds its data."""
    if isinstance(value, str):
        return shorten_inline(value) if is_inline(value) else value
    if isinstance(value, list):
        return [hide_inline(item) for item in value]
    return {name: hide_inline(item) for name, item in value.items()} if isinstance(value, dict) else value


def find_image_field(values: Mapping[str, Any]) -> str | None:
    """Return a field that seems to name or hold an image, by its name or its text; nothing is read."""
    named = choose_image_columns(values)
    texts = (name for name, text in _walk_strings(values) if is_inline(text) or _has_media_suffix(text))
    return named[0] if named else next(texts, None)


class ImageFinder:
    """Finds images in fields of other names, so that a row with an image is never answered as text only."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._checks: Counter[str] = Counter()  # of files in a store, by field

    def check_text_only(self, values: Mapping[str, Any]) -> None:
        """Raise SourceError if a field names an image: a `data:` URI, a URL, or an existing file, by its suffix."""
        for name, text in _walk_strings(values):
            if is_inline(text) or (_has_media_suffix(text) and self._is_file(name, text)):
                field, shown = shorten_inline(name), shorten_inline(store.redact(text))
                raise SourceError(
                    f"{store.redact(self._uri)}: the field {field!r} holds an image ({shown}); choose it with "
                    f"--image-column {field}, or send rows as text only with --image-column ''"
                )

    def _is_file(self, name: str, text: str) -> bool:
        if "://" in text:
            return True
        path = resolve_path(text, self._uri)
        if "://" in path:
            self._checks[name] += 1
        try:
            return self._checks[name] <= _MAX_REMOTE_CHECKS and store.find_file(path) is not None
        except (OSError, ValueError):  # not a path
            return False


def _walk_strings(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (field, text) for the texts in the fields, in lists and objects in them, and one level below these."""
    for name, value in values.items():
        for text in _list_strings(value, levels=2):
            yield name, text


def _list_strings(value: Any, levels: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif levels and isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _list_strings(item, levels - 1)


def _has_media_suffix(text: str) -> bool:
    # A prompt that ends with the name of a file has blanks in front of it; a file may have them too.
    is_short = 4 < len(text) <= _MAX_PATH_CHARACTERS and "\n" not in text and not ("://" in text and " " in text)
    return is_short and PurePosixPath(store.strip_query(text)[-16:]).suffix.lower() in IMAGE_SUFFIXES
