"""JSON lines, each an object that names its images and holds columns."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import Any

from pipelines.errors import SourceError
from pipelines.media.reference import ImageRef, resolve
from pipelines.sources.rows import Chunk, Columns, Row, chunks_of, json_object, row_error, text_of
from pipelines.storage import store
from pipelines.storage.store import FileInfo

MAX_LINE_BYTES = 16 << 20
_IMAGE_FIELDS = ("image", "video", "uri", "file_name")
_BLOCK_BYTES, _READ_BYTES = 8 << 20, 1 << 20


def list_jsonl(info: FileInfo, columns: Columns) -> Iterator[Chunk]:
    """A row for every line that is not blank; a bad line is an error row with its number (from 1)."""
    return chunks_of(_rows(info.uri, columns), columns.keep)


def _rows(uri: str, columns: Columns) -> Iterator[Row]:
    number = 0
    try:
        with store.open_file(uri, block_bytes=_BLOCK_BYTES) as file:
            for number, line in enumerate(_lines(file, uri), 1):
                if line.strip():
                    yield _row(uri, number, line, columns)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield _error_row(uri, number + 1, f"the file is damaged behind line {number}, nothing more is read: {error}")
    except OSError as error:
        raise SourceError(f"cannot read {store.shown(uri)}: {error}") from error


def _lines(file: Any, uri: str) -> Iterator[bytes]:
    """Lines; what is longer than MAX_LINE_BYTES is cut a block behind it."""
    # read1: what was unpacked before damage is not lost with it.
    read = gzip.GzipFile(fileobj=file).read1 if store.name_of(uri).lower().endswith(".gz") else file.read
    begun = bytearray()
    while block := read(_READ_BYTES):
        first, *others = block.split(b"\n")
        if len(begun) <= MAX_LINE_BYTES:
            begun += first
        for line in others:
            yield bytes(begun)
            begun = bytearray(line)
    if begun:
        yield bytes(begun)


def _row(uri: str, number: int, line: bytes, columns: Columns) -> Row:
    try:
        values = _values(line)
        images = _images(uri, values, columns.image)
    except ValueError as error:
        return _error_row(uri, number, f"line {number}: {error}")
    prompt = text_of(values.get(columns.prompt or "prompt"))
    return Row(
        id=text_of(values.get(columns.id or "id")) or f"{uri}#{number}",
        uri=images[0].uri if images else uri,
        images=images,
        prompt=prompt,
        values=values,
        error=row_error(images, prompt, f"line {number}"),
    )


def _error_row(uri: str, number: int, error: str) -> Row:
    return Row(f"{uri}#{number}", uri, error=error)


def _values(line: bytes) -> dict[str, Any]:
    """Raises ValueError, which JSON and Unicode errors are."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    return json_object(line)


def _images(uri: str, values: dict[str, Any], column: str | None) -> tuple[ImageRef, ...]:
    given = [values[name] for name in (_IMAGE_FIELDS if column is None else [column]) if values.get(name)]
    paths = given[0] if given and isinstance(given[0], list) else given[:1]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"an image must be given by its path or URI, not as {str(path)[:80]!r}")
    return tuple(ImageRef("file", resolve(path, uri)) for path in paths)
