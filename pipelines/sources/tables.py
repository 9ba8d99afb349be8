"""List Parquet and Arrow files: choose the column of images, and turn batches into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.errors import SourceError, TableError
from pipelines.media.inline import is_inline
from pipelines.media.reference import ByteRange, CellRef, FileRef, ImageRef, resolve_path
from pipelines.sources.columns import make_columns, refer_to_cells, refer_to_files
from pipelines.sources.image_columns import choose_image_columns
from pipelines.sources.image_types import find_content, is_fixed_size, is_struct
from pipelines.sources.kept_columns import normalize_column
from pipelines.sources.rows import (
    ROWS_PER_CHUNK,
    Chunk,
    ColumnRoles,
    SourceRow,
    group_into_chunks,
    raise_source_errors,
)
from pipelines.storage import store
from pipelines.storage.store import FileInfo
from pipelines.storage.table_reader import ParquetTable, get_processes

_MAX_SHOWN, _MAX_SHOWN_CHARACTERS = 20, 40  # of columns in a message
_SAFE_BYTES, _MAX_RATIO = 64 << 20, 200  # a column of a row group may unpack to so much at any ratio


def list_parquet(info: FileInfo, columns: ColumnRoles) -> Iterator[Chunk]:
    """List the rows of a Parquet file; the column of images is only read if it holds URIs.

    A file that is damaged or not Parquet is one error row, after the rows that precede the damage.
    """
    yield from _end_at_damage(info.uri, " as Parquet", columns, _read_parquet(info.uri, columns))


def _end_at_damage(uri: str, form: str, columns: ColumnRoles, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks; end with an error row if the file is damaged. Raise SourceError if it cannot be accessed."""
    at = 0
    try:
        with raise_source_errors(uri, form):
            for chunk in chunks:
                yield chunk
                at += len(chunk)
    except SourceError as error:
        if not isinstance(error.__cause__, TableError):
            raise
        rest = f"; from row {at} on no row is listed" if at else ""
        row = SourceRow(f"{uri}#{at}" if at else uri, uri, error=f"{error}{rest}")
        yield from (replace(chunk, unreadable=not at) for chunk in group_into_chunks([row], columns.keep))


def _read_parquet(uri: str, columns: ColumnRoles) -> Iterator[Chunk]:
    with get_processes().open_parquet(uri) as file:
        if not sum(file.num_rows):
            return
        table, at = TableShard.from_schema(uri, file.schema, columns), 0
        check_ratio(uri, file, [*table.columns_to_read, *filter(None, [table.image])])
        for batch in file.iter_batches(table.columns_to_read, ROWS_PER_CHUNK):
            yield table.make_chunk(batch, at, CellRef(uri, table.image or "", at))
            at += len(batch)


def check_ratio(uri: str, file: ParquetTable, names: Sequence[str]) -> None:
    """Raise SourceError for a column that would unpack to more than 200 times its size."""
    if column := file.find_large_column(names, _SAFE_BYTES, _MAX_RATIO):
        raise SourceError(
            f"{store.redact(uri)}: column {column.name} unpacks from {column.packed_bytes:,} to "
            f"{column.unpacked_bytes:,} bytes in row group {column.group}; if that is correct, rewrite the file with "
            "smaller row groups"
        )


def list_arrow(info: FileInfo, columns: ColumnRoles) -> Iterator[Chunk]:
    """List the rows of an Arrow stream. A local file is mapped, a remote one read whole: streams have no index.

    A file that is damaged or not a stream is one error row, after the rows that precede the damage.
    """
    yield from _end_at_damage(info.uri, " as an Arrow stream", columns, _read_arrow(info.uri, columns))


def _read_arrow(uri: str, columns: ColumnRoles) -> Iterator[Chunk]:
    with get_processes().open_arrow(uri) as file:
        if any(pa.types.is_dictionary(field.type) for field in file.schema):
            raise SourceError(
                f"{store.redact(uri)}: Arrow streams with dictionaries are not supported; save the dataset as Parquet"
            )
        if not file.has_rows():  # then it may lack the columns
            return
        table, at = TableShard.from_schema(uri, file.schema, columns), 0
        for offset, num_bytes, batch in file.iter_batches(table.columns_to_read):
            byte_range = ByteRange(offset, num_bytes)
            for first in range(0, len(batch), ROWS_PER_CHUNK):
                cell = CellRef(uri, table.image or "", first, byte_range)
                yield table.make_chunk(batch.slice(first, ROWS_PER_CHUNK), at + first, cell)
            at += len(batch)


@dataclass(frozen=True)
class TableShard:
    """A shard with known columns. `image` names the column of images; `holds_uris` means URIs instead of bytes."""

    uri: str
    columns: ColumnRoles
    names: frozenset[str]
    image: str | None
    holds_uris: bool

    @classmethod
    def from_schema(cls, uri: str, schema: pa.Schema, columns: ColumnRoles) -> TableShard:
        """Find the columns by role. Raise SourceError if a requested one is missing or ambiguous."""
        names = frozenset(schema.names)
        if repeated := sorted(name for name in names if schema.names.count(name) > 1):
            raise SourceError(f"{store.redact(uri)} has several columns named {', '.join(repeated)}; rename them")
        if missing := sorted(columns.wanted - names):
            braces = " (in prompts, write {{ and }} for braces)" if columns.in_prompt - names else ""
            raise SourceError(f"{store.redact(uri)} has no column {', '.join(missing)}{braces}; {_describe(schema)}")
        image = _choose_image_column(uri, schema, columns.image)
        return cls(uri, columns, names, image, image is not None and find_content(schema.field(image).type) == "uris")

    @property
    def columns_to_read(self) -> list[str]:
        """The columns that the listing reads: that of the images only if it holds URIs."""
        return sorted(self.columns.wanted.union([self.image] if self.image and self.holds_uris else []))

    def make_chunk(self, batch: pa.RecordBatch, at: int, first: CellRef) -> Chunk:
        """Make the rows of a batch of `columns_to_read`; `first` holds the images of its first row, number `at`."""
        if (plain := self._make_columns(batch, at, first)) is not None:
            return Chunk((), self.names, self._keep_columns(batch), columns=plain)
        cells = [CellRef(first.uri, first.column, first.row + i, first.batch) for i in range(batch.num_rows)]
        values = self._read_values(batch) or [{}] * len(cells)
        images = self._make_references(batch, cells)
        numbered = enumerate(zip(values, images, strict=True), at)
        rows = [self.columns.make_row(self.uri, i, *row, unit="row") for i, row in numbered]
        return Chunk(rows, self.names, self._keep_columns(batch))

    def _make_columns(self, batch: pa.RecordBatch, at: int, first: CellRef) -> pa.Table | None:
        """Return the rows of a batch as columns; None if some are not plain."""
        images, numbers = None, np.arange(at, at + batch.num_rows)
        if self.image:
            is_uris = self.holds_uris
            images = refer_to_files(batch[self.image], self.uri) if is_uris else refer_to_cells(first, len(numbers))
            if images is None:
                return None
        return make_columns(self.columns, self.uri, numbers, batch, images)

    def _read_values(self, batch: pa.RecordBatch) -> list[dict[str, Any]]:
        texts = batch.select(sorted(self.columns.text_columns))
        try:
            return texts.to_pylist()  # type: ignore[no-any-return]
        except (ValueError, OverflowError, KeyError) as error:
            raise SourceError(
                f"{store.redact(self.uri)}: the values of {', '.join(texts.schema.names)} cannot be written as text "
                f"({error}); {_describe(texts.schema)}"
            ) from error

    def _keep_columns(self, batch: pa.RecordBatch) -> pa.Table | None:
        keep = {name: pa.chunked_array([batch.column(name)]) for name in self.columns.keep}
        return pa.table({name: normalize_column(name, column) for name, column in keep.items()}) if keep else None

    def _make_references(self, batch: pa.RecordBatch, cells: Sequence[CellRef]) -> Sequence[tuple[ImageRef, ...]]:
        if self.image is None:
            return [()] * len(cells)
        if not self.holds_uris:
            return [(cell,) for cell in cells]
        values = batch.column(self.image).to_pylist()
        return [self._refer(value, cell) for value, cell in zip(values, cells, strict=True)]

    def _refer(self, value: Any, cell: CellRef) -> tuple[ImageRef, ...]:
        """Refer to the files that a cell names, or to the cell itself if it holds an image as text."""
        paths = [path for path in map(_get_path, value if isinstance(value, list) else [value]) if path]
        if any(map(is_inline, paths)):
            return (cell,)
        return tuple(FileRef(resolve_path(path, self.uri)) for path in paths)


def _get_path(value: Any) -> str | None:
    path: str | None = value.get("path") if isinstance(value, dict) else value
    return path


def _choose_image_column(uri: str, schema: pa.Schema, given: str | None) -> str | None:
    """Return the column of images, None for "". Raise SourceError naming the candidates if it is ambiguous."""
    if given == "":
        return None
    contents = {field.name: find_content(field.type) for field in schema}
    if given is not None:
        if contents[given] is not None:
            return given if contents[given] != "nothing" else None
        raise SourceError(f"{store.redact(uri)}: column {given!r} holds neither bytes nor URIs; {_describe(schema)}")
    fixed = [field.name for field in schema if is_fixed_size(field.type)]
    candidates: list[str] = (
        [name for name, content in contents.items() if content == "bytes" and name not in fixed]
        or choose_image_columns({name: content == "uris" for name, content in contents.items()})
        or [name for name in contents if contents[name] == "uris" and is_struct(schema.field(name).type)]
        or fixed
    )
    if not candidates and choose_image_columns({name: content == "nothing" for name, content in contents.items()}):
        return None  # a shard in which no row has an image
    if len(candidates) != 1:
        found = f"{', '.join(candidates)} may all hold" if candidates else "no column seems to hold"
        raise SourceError(
            f"{store.redact(uri)}: {found} the images; choose the column with --image-column, or '' for none; "
            f"{_describe(schema)}"
        )
    return candidates[0]


def _describe(schema: pa.Schema) -> str:
    """Name the columns and their types, shortened so that the message can be read."""
    shown = [f"{_shorten(field.name)} ({_shorten(str(field.type))})" for field in list(schema)[:_MAX_SHOWN]]
    more = [f"{len(schema) - _MAX_SHOWN} more"] if len(schema) > _MAX_SHOWN else []
    return "it has " + ", ".join([*shown, *more])


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[: _MAX_SHOWN_CHARACTERS - 3]}..."
