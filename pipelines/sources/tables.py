"""List Parquet and Arrow files: choose the column of images, and turn batches into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import SourceError
from pipelines.media.reference import ByteRange, CellRef, FileRef, ImageRef, resolve_path
from pipelines.sources.kept_columns import normalize_column
from pipelines.sources.rows import ROWS_PER_CHUNK, Chunk, ColumnRoles, raise_source_errors
from pipelines.storage import store
from pipelines.storage.arrow_ipc import read_batch, read_schema
from pipelines.storage.store import FileInfo

_URI_COLUMNS = "image images uri image_uri url image_url path image_path file_name video video_url video_path"
_SAFE_BYTES = 64 << 20  # a column of a row group may unpack to this much at any ratio


def list_parquet(info: FileInfo, columns: ColumnRoles) -> Iterator[Chunk]:
    """List the rows of a Parquet file; the column of images is only read if it holds URIs."""
    with raise_source_errors(info.uri, " as Parquet"), store.open_file(info.uri) as file:
        parquet = pq.ParquetFile(file, buffer_size=store.PARQUET_BUFFER_BYTES, pre_buffer=False)
        yield from _read_parquet(info.uri, parquet, columns)


def _read_parquet(uri: str, parquet: pq.ParquetFile, columns: ColumnRoles) -> Iterator[Chunk]:
    table = TableShard.from_schema(uri, parquet.schema_arrow, columns)
    check_ratio(uri, parquet.metadata, {*table.columns_to_read, table.image})
    at = 0
    for batch in parquet.iter_batches(ROWS_PER_CHUNK, columns=table.columns_to_read, use_threads=False):
        batch.validate(full=True)  # invalid UTF-8 would otherwise be found at the end of the run
        numbers = range(at, at + len(batch))
        yield table.make_chunk(batch, at, [CellRef(uri, table.image or "", i) for i in numbers])
        at += len(batch)


def check_ratio(uri: str, metadata: pq.FileMetaData, names: set[str | None]) -> None:
    """Raise SourceError for a column that would unpack to more than 200 times its size."""
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if column.path_in_schema.partition(".")[0] in names and unpacked > max(_SAFE_BYTES, 200 * packed):
                raise SourceError(
                    f"{store.redact(uri)}: column {column.path_in_schema} unpacks from {packed:,} to {unpacked:,} "
                    f"bytes in row group {group}; if that is correct, rewrite the file with smaller row groups"
                )


def list_arrow(info: FileInfo, columns: ColumnRoles) -> Iterator[Chunk]:
    """List the rows of an Arrow stream. A local file is mapped, a remote one read whole: streams have no index."""
    with raise_source_errors(info.uri, " as an Arrow stream"), store.map_file(info.uri) as file:
        schema = read_schema(file)
        table = TableShard.from_schema(info.uri, schema, columns)
        yield from _read_arrow(table, file, schema)


def _read_arrow(table: TableShard, file: Any, schema: pa.Schema) -> Iterator[Chunk]:
    at, begin = 0, file.tell()
    for message in _read_messages(file):
        end = file.tell()
        batch, byte_range = read_batch(message, schema, table.columns_to_read), ByteRange(begin, end - begin)
        for first in range(0, len(batch), ROWS_PER_CHUNK):
            numbers = range(first, min(len(batch), first + ROWS_PER_CHUNK))
            cells = [CellRef(table.uri, table.image or "", i, byte_range) for i in numbers]
            yield table.make_chunk(batch.slice(first, len(numbers)), at + first, cells)
        at, begin = at + len(batch), end


def _read_messages(file: Any) -> Iterator[pa.ipc.Message]:
    while True:
        begin = file.tell()
        try:
            message = pa.ipc.read_message(file)
        except EOFError:
            break
        yield message
    if file.tell() == begin:
        raise pa.ArrowInvalid("truncated: it has no end mark")


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
        return cls(uri, columns, names, image, image is not None and _has_uris(schema.field(image).type))

    @property
    def columns_to_read(self) -> list[str]:
        """The columns that the listing reads: that of the images only if it holds URIs."""
        return sorted(self.columns.wanted.union([self.image] if self.image and self.holds_uris else []))

    def make_chunk(self, batch: pa.RecordBatch, at: int, cells: Sequence[CellRef]) -> Chunk:
        """Make the rows of a batch of `columns_to_read`; the first is row number `at`, `cells` hold their images."""
        values = batch.select(sorted(self.columns.text_columns)).to_pylist() or [{}] * len(cells)
        images = self._make_references(batch, cells)
        numbered = enumerate(zip(values, images, strict=True), at)
        rows = [self.columns.make_row(self.uri, i, *row, unit="row") for i, row in numbered]
        return Chunk(rows, self.names, self._keep_columns(batch))

    def _keep_columns(self, batch: pa.RecordBatch) -> pa.Table | None:
        keep = {name: pa.chunked_array([batch.column(name)]) for name in self.columns.keep}
        return pa.table({name: normalize_column(name, column) for name, column in keep.items()}) if keep else None

    def _make_references(self, batch: pa.RecordBatch, cells: Sequence[CellRef]) -> Sequence[tuple[ImageRef, ...]]:
        if self.image is None:
            return [()] * len(cells)
        if not self.holds_uris:
            return [(cell,) for cell in cells]
        values = map(_to_list, batch.column(self.image).to_pylist())
        return [tuple(FileRef(resolve_path(path, self.uri)) for path in paths if path) for paths in values]


def _to_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _choose_image_column(uri: str, schema: pa.Schema, given: str | None) -> str | None:
    """Return the column of images, None for "". Raise SourceError naming the candidates if it is ambiguous."""
    if given == "":
        return None
    if given is not None:
        if given in schema.names and (_has_bytes(schema.field(given).type) or _has_uris(schema.field(given).type)):
            return given
        raise SourceError(f"{store.redact(uri)}: column {given!r} holds neither bytes nor URIs; {_describe(schema)}")
    holders = [field.name for field in schema if _has_bytes(field.type)]
    candidates: list[str] = holders or [
        f.name for f in schema if f.name.lower() in _URI_COLUMNS.split() and _has_uris(f.type)
    ]
    if len(candidates) != 1:
        found = f"{', '.join(candidates)} may all hold" if candidates else "no column seems to hold"
        raise SourceError(
            f"{store.redact(uri)}: {found} the images; choose the column with --image-column, or '' for none; "
            f"{_describe(schema)}"
        )
    return candidates[0]


def _describe(schema: pa.Schema) -> str:
    return "it has " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def _has_bytes(type_: pa.DataType) -> bool:
    """Return whether the type is bytes, Hugging Face's struct of bytes and path, or a list of either."""
    item = _get_item_type(type_)
    if pa.types.is_struct(item):
        return item.get_field_index("bytes") >= 0 and _is_binary(item.field("bytes").type)
    return _is_binary(item)


def _has_uris(type_: pa.DataType) -> bool:
    item = _get_item_type(type_)
    if pa.types.is_dictionary(item):
        item = item.value_type
    return bool(pa.types.is_string(item) or pa.types.is_large_string(item) or pa.types.is_string_view(item))


def _get_item_type(type_: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return type_.value_type if is_list else type_


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))
