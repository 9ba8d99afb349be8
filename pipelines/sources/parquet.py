"""Parquet: a row is a row; cells of images are left where they are, to be read by row group."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from pipelines.errors import SourceError
from pipelines.media.reference import CellRef
from pipelines.sources.rows import ROWS_PER_CHUNK, Chunk, Columns, source_errors
from pipelines.sources.tables import Table
from pipelines.storage import store
from pipelines.storage.store import FileInfo

_HARMLESS_BYTES = 64 << 20  # that a column of a row group may unpack to from nearly nothing


def list_parquet(info: FileInfo, columns: Columns) -> Iterator[Chunk]:
    """List the rows; the column of images is only read if it holds URIs."""
    with source_errors(info.uri, " as Parquet"), store.open_file(info.uri) as file:
        parquet = pq.ParquetFile(file, buffer_size=store.PARQUET_BUFFER_BYTES, pre_buffer=False)
        yield from _chunks(info.uri, parquet, columns)


def _chunks(uri: str, parquet: pq.ParquetFile, columns: Columns) -> Iterator[Chunk]:
    table = Table.of(uri, parquet.schema_arrow, columns)
    _check_packing(uri, parquet.metadata, {*table.read, table.image})
    at = 0
    for batch in parquet.iter_batches(ROWS_PER_CHUNK, columns=table.read, use_threads=False):
        batch.validate(full=True)  # text that is no UTF-8 would be found when the run is done
        numbers = range(at, at + len(batch))
        yield table.chunk(batch, at, [CellRef(uri, table.image or "", i) for i in numbers])
        at += len(batch)


def _check_packing(uri: str, metadata: pq.FileMetaData, names: set[str | None]) -> None:
    """Raise SourceError for a column that would unpack to far more than its size."""
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if column.path_in_schema.partition(".")[0] in names and unpacked > max(_HARMLESS_BYTES, 200 * packed):
                raise SourceError(
                    f"{store.shown(uri)}: column {column.path_in_schema} unpacks from {packed:,} to {unpacked:,} "
                    f"bytes in row group {group}; write the file again with smaller row groups if that is meant"
                )
