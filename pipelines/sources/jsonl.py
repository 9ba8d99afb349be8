"""List JSON lines: each line is an object that names its images and holds columns."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.media.reference import FileRef, resolve_path
from pipelines.sources.rows import (
    Chunk,
    ColumnRoles,
    SourceRow,
    group_into_chunks,
    parse_json_object,
    raise_source_errors,
)
from pipelines.storage import store
from pipelines.storage.store import FileInfo

_IMAGE_FIELDS = ("image", "video", "uri", "file_name")
_BLOCK_BYTES, _READ_BYTES = 8 << 20, 1 << 20


def list_jsonl(info: FileInfo, columns: ColumnRoles, *, max_line_bytes: int = 16 << 20) -> Iterator[Chunk]:
    """List one row per non-blank line; an invalid line becomes an error row with its line number (from 1)."""
    columns = replace(columns, id=columns.id or "id", prompt=columns.prompt or "prompt")
    with raise_source_errors(info.uri):
        yield from group_into_chunks(_read_rows(info.uri, columns, max_line_bytes), columns.keep)


def _read_rows(uri: str, columns: ColumnRoles, max_line_bytes: int) -> Iterator[SourceRow]:
    number = 0
    try:
        with store.open_file(uri, block_bytes=_BLOCK_BYTES) as file:
            for number, line in enumerate(_split_lines(file, uri, max_line_bytes), 1):
                if len(line) > max_line_bytes and line.strip():
                    yield _make_error_row(uri, number, f"line {number}: longer than {max_line_bytes:,} bytes")
                elif line.strip():
                    yield _parse_row(uri, number, line, columns)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield _make_error_row(
            uri, number + 1, f"the file is damaged after line {number}; the rest is not read: {error}"
        )


def _split_lines(file: Any, uri: str, max_line_bytes: int) -> Iterator[bytes]:
    """Yield lines; a line longer than `max_line_bytes` is cut up to one block after that limit."""
    # read1 returns what was unpacked before the damage instead of losing it.
    read = gzip.GzipFile(fileobj=file).read1 if store.strip_query(uri).lower().endswith(".gz") else file.read
    unfinished = bytearray()
    while block := read(_READ_BYTES):
        first, *others = block.split(b"\n")
        if len(unfinished) <= max_line_bytes:
            unfinished += first
        for line in others:
            yield bytes(unfinished)
            unfinished = bytearray(line)
    if unfinished:
        yield bytes(unfinished)


def _parse_row(uri: str, number: int, line: bytes, columns: ColumnRoles) -> SourceRow:
    try:
        values = parse_json_object(line)
        images = _find_images(uri, values, columns.image)
    except ValueError as error:
        return _make_error_row(uri, number, f"line {number}: {error}")
    return columns.make_row(uri, number, values, images, unit="line")


def _make_error_row(uri: str, number: int, error: str) -> SourceRow:
    return SourceRow(f"{uri}#{number}", uri, error=error)


def _find_images(uri: str, values: dict[str, Any], column: str | None) -> tuple[FileRef, ...]:
    given = [values[name] for name in (_IMAGE_FIELDS if column is None else [column]) if values.get(name)]
    paths = given[0] if given and isinstance(given[0], list) else given[:1]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"an image must be a path or URI, not {str(path)[:80]!r}")
    return tuple(FileRef(resolve_path(path, uri)) for path in paths)
