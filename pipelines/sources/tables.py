"""Find the role of each column in an Arrow table, and turn batches of such a table into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import SourceError
from pipelines.media.reference import ByteRange, CellRef, FileRef, ImageRef, resolve_path
from pipelines.sources.rows import ROWS_PER_CHUNK, Chunk, ColumnRoles, raise_source_errors
from pipelines.storage import store
from pipelines.storage.arrow_ipc import read_batch, read_schema
from pipelines.storage.store import FileInfo

_URI_COLUMNS = "image images uri image_uri url image_url path image_path file_name video video_url video_path"
_HARMLESS_BYTES = 64 << 20  # that a column of a row group may unpack to from nearly nothing


def list_parquet(info: FileInfo, columns: ColumnRoles) -> Iterator[Chunk]:
    """List the rows; the column of images is only read if it holds URIs."""
    with raise_source_errors(info.uri, " as Parquet"), store.open_file(info.uri) as file:
        parquet = pq.ParquetFile(file, buffer_size=store.PARQUET_BUFFER_BYTES, pre_buffer=False)
        yield from _parquet_chunks(info.uri, parquet, columns)


def _parquet_chunks(uri: str, parquet: pq.ParquetFile, columns: ColumnRoles) -> Iterator[Chunk]:
    table = TableShard.from_schema(uri, parquet.schema_arrow, columns)
    _check_packing(uri, parquet.metadata, {*table.columns_to_read, table.image})
    at = 0
    for batch in parquet.iter_batches(ROWS_PER_CHUNK, columns=table.columns_to_read, use_threads=False):
        batch.validate(full=True)  # text that is no UTF-8 would be found when the run is done
        numbers = range(at, at + len(batch))
        yield table.make_chunk(batch, at, [CellRef(uri, table.image or "", i) for i in numbers])
        at += len(batch)


def _check_packing(uri: str, metadata: pq.FileMetaData, names: set[str | None]) -> None:
    """Raise SourceError for a column that would unpack to far more than its size."""
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if column.path_in_schema.partition(".")[0] in names and unpacked > max(_HARMLESS_BYTES, 200 * packed):
                raise SourceError(
                    f"{store.redact(uri)}: column {column.path_in_schema} unpacks from {packed:,} to {unpacked:,} "
                    f"bytes in row group {group}; write the file again with smaller row groups if that is meant"
                )


def list_arrow(info: FileInfo, columns: ColumnRoles) -> Iterator[Chunk]:
    """List the rows of a stream. A local file is mapped, one in a store is read whole: streams have no index."""
    with raise_source_errors(info.uri, " as an Arrow stream"), store.map_file(info.uri) as file:
        schema = read_schema(file)
        table = TableShard.from_schema(info.uri, schema, columns)
        yield from _arrow_chunks(table, file, schema)


def _arrow_chunks(table: TableShard, file: Any, schema: pa.Schema) -> Iterator[Chunk]:
    at, begin = 0, file.tell()
    for message in _messages(file):
        end = file.tell()
        batch, place = read_batch(message, schema, table.columns_to_read), ByteRange(begin, end - begin)
        for first in range(0, len(batch), ROWS_PER_CHUNK):
            numbers = range(first, min(len(batch), first + ROWS_PER_CHUNK))
            cells = [CellRef(table.uri, table.image or "", i, place) for i in numbers]
            yield table.make_chunk(batch.slice(first, len(numbers)), at + first, cells)
        at, begin = at + len(batch), end


def _messages(file: Any) -> Iterator[pa.ipc.Message]:
    while True:
        begin = file.tell()
        try:
            message = pa.ipc.read_message(file)
        except EOFError:
            break
        yield message
    if file.tell() == begin:
        raise pa.ArrowInvalid("it ends without an end mark: truncated")


@dataclass(frozen=True)
class TableShard:
    """A shard whose columns are known. `image` is the column that holds images, `holds_uris` by their URIs."""

    uri: str
    columns: ColumnRoles
    names: frozenset[str]
    image: str | None
    holds_uris: bool

    @classmethod
    def from_schema(cls, uri: str, schema: pa.Schema, columns: ColumnRoles) -> TableShard:
        """Find the columns. Raises SourceError if one that is asked for is missing or ambiguous."""
        names = frozenset(schema.names)
        if doubled := sorted(name for name in names if schema.names.count(name) > 1):
            raise SourceError(f"{store.redact(uri)} has several columns named {', '.join(doubled)}; rename them")
        if missing := sorted(columns.wanted - names):
            braces = " ({{ and }} in prompts stand for braces)" if columns.in_prompt - names else ""
            raise SourceError(f"{store.redact(uri)} has no column {', '.join(missing)}{braces}; {_describe(schema)}")
        image = _image_column(uri, schema, columns.image)
        return cls(uri, columns, names, image, image is not None and _holds_uris(schema.field(image).type))

    @property
    def columns_to_read(self) -> list[str]:
        """Return the columns that are read while listing: that of the images only if it holds URIs."""
        return sorted(self.columns.wanted.union([self.image] if self.image and self.holds_uris else []))

    def make_chunk(self, batch: pa.RecordBatch, at: int, cells: Sequence[CellRef]) -> Chunk:
        """Return the rows of a batch of the columns `read`; the first is row `at`, `cells` are their images."""
        values = batch.select(sorted(self.columns.text_columns)).to_pylist() or [{}] * len(cells)
        images = self._images(batch, cells)
        numbered = enumerate(zip(values, images, strict=True), at)
        rows = [self.columns.make_row(self.uri, i, *row, what="row") for i, row in numbered]
        keep = list(self.columns.keep)
        return Chunk(rows, self.names, pa.Table.from_batches([batch.select(keep)]) if keep else None)

    def _images(self, batch: pa.RecordBatch, cells: Sequence[CellRef]) -> Sequence[tuple[ImageRef, ...]]:
        if self.image is None:
            return [()] * len(cells)
        if not self.holds_uris:
            return [(cell,) for cell in cells]
        values = map(_flat, batch.column(self.image).to_pylist())
        return [tuple(FileRef(resolve_path(path, self.uri)) for path in paths if path) for paths in values]


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _image_column(uri: str, schema: pa.Schema, given: str | None) -> str | None:
    """Return the column of images, None for "". Raises SourceError with the candidates unless there is just one."""
    if given == "":
        return None
    if given is not None:
        if given in schema.names and (_holds_bytes(schema.field(given).type) or _holds_uris(schema.field(given).type)):
            return given
        raise SourceError(f"{store.redact(uri)}: column {given!r} holds neither bytes nor URIs; {_describe(schema)}")
    holders = [field.name for field in schema if _holds_bytes(field.type)]
    candidates: list[str] = holders or [
        f.name for f in schema if f.name.lower() in _URI_COLUMNS.split() and _holds_uris(f.type)
    ]
    if len(candidates) != 1:
        found = f"{', '.join(candidates)} may all be" if candidates else "no column looks like"
        raise SourceError(
            f"{store.redact(uri)}: {found} the images; name the column with --image-column, or '' for none; "
            f"{_describe(schema)}"
        )
    return candidates[0]


def _describe(schema: pa.Schema) -> str:
    return "it has " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def _holds_bytes(type_: pa.DataType) -> bool:
    """Return whether it holds bytes, Hugging Face's struct of bytes and path, or a list of either."""
    item = _item_type(type_)
    if pa.types.is_struct(item):
        return item.get_field_index("bytes") >= 0 and _is_binary(item.field("bytes").type)
    return _is_binary(item)


def _holds_uris(type_: pa.DataType) -> bool:
    item = _item_type(type_)
    if pa.types.is_dictionary(item):
        item = item.value_type
    return bool(pa.types.is_string(item) or pa.types.is_large_string(item) or pa.types.is_string_view(item))


def _item_type(type_: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return type_.value_type if is_list else type_


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))
