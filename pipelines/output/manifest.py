"""The frozen input: row number, id and uri of every row, written once to OUTPUT/manifest and read by row range."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.media.reference import ImageRef, can_read_image, locate, parse_reference
from pipelines.output.ledger import RowRange
from pipelines.schema import KEPT, MANIFEST, ROW, ROWS_PER_GROUP
from pipelines.storage import store

ROWS_PER_FILE = 1 << 17


def write_manifest(output: str, tables: Iterable[pa.Table], first_row: int = 0) -> None:
    """Write a manifest to OUTPUT without a run record; a run writes it with `commit_exchange`."""
    for path, data in encode_manifest(output, tables, first_row):
        store.write_bytes(store.join(output, path), data)


def encode_manifest(output: str, tables: Iterable[pa.Table], first_row: int = 0) -> Iterator[tuple[str, bytes]]:
    """Encode tables of the manifest schema without row numbers as numbered files of ROWS_PER_FILE rows.

    Yield the path in OUTPUT and the content of each file. With `first_row` the rows follow the existing ones, and the
    first file also holds the existing rows of the file that it replaces.
    """
    for start, table in _cut_files(tables, first_row):
        if start % ROWS_PER_FILE:
            # Keep the last file's rows up to `start`: version 0.1 left later ones when an extension was killed.
            begun = store.read_parquet(_locate_file(output, start)).slice(0, start % ROWS_PER_FILE)
            table = pa.concat_tables([begun.drop_columns([ROW]), table])
            start -= start % ROWS_PER_FILE
        numbers = pa.array(range(start, start + len(table)), pa.int64())
        buffer = io.BytesIO()
        numbered = table.add_column(0, MANIFEST.field(ROW), numbers)
        pq.write_table(numbered, buffer, row_group_size=ROWS_PER_GROUP, compression="zstd")
        yield _name_file(start), buffer.getvalue()


def read_columns(output: str, num_rows: int, columns: list[str]) -> Iterator[pa.Table]:
    """Yield some columns of all rows, one table per file."""
    for start in range(0, num_rows, ROWS_PER_FILE):
        yield store.read_parquet(_locate_file(output, start), columns).slice(0, num_rows - start)


def read_range(output: str, rows: RowRange, columns: list[str]) -> Iterator[pa.Table]:
    """Yield some columns of the rows in a range of any length, one table per file."""
    for start in range(rows.start - rows.start % ROWS_PER_FILE, rows.stop, ROWS_PER_FILE):
        table = store.read_parquet(_locate_file(output, start), columns)
        first = max(rows.start - start, 0)
        yield table.slice(first, rows.stop - start - first)


def read_rows(output: str, rows: RowRange) -> pa.Table:
    """Return rows in the schema MANIFEST. They must lie in one row group: cut at ROWS_PER_GROUP or a divisor of it."""
    first, last = rows.start // ROWS_PER_GROUP, (rows.stop - 1) // ROWS_PER_GROUP
    assert first == last, f"rows {rows} cross a row group of {ROWS_PER_GROUP}"
    return _read_group(output, first, MANIFEST.names).slice(rows.start - first * ROWS_PER_GROUP, rows.stop - rows.start)


def take_rows(output: str, rows: NDArray[np.int64], columns: list[str]) -> pa.Table:
    """Return some columns of the rows with these numbers, which must be sorted and at least one."""
    groups = [
        _read_group(output, group, columns).take(rows[rows // ROWS_PER_GROUP == group] % ROWS_PER_GROUP)
        for group in np.unique(rows // ROWS_PER_GROUP).tolist()
    ]
    return pa.concat_tables(groups)


def sample_images(output: str) -> Iterator[ImageRef]:
    """Yield the images of a few rows from the start, the middle and the end."""
    files = store.list_files(store.join(output, "manifest"))
    for number in _spread(len(files)):
        with store.open_file(files[number].uri) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            for group in _spread(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=["images"], use_threads=False).column(0)
                for row in _spread(len(rows)):
                    yield from map(parse_reference, rows[row].as_py())


def is_store_down(output: str, images: Sequence[ImageRef]) -> bool:
    """Return whether no other image of the store of a row's `images` can be read.

    A store that only this row uses does not count as the run's store: then return False.
    """
    own = set(map(locate, images))
    roots = {store.get_store_root(uri) for uri, _ in own}
    others = [image for image in sample_images(output) if locate(image) not in own]
    nearby = [image for image in others if store.get_store_root(image.uri) in roots]
    if others and not nearby:
        return False
    return not any(map(can_read_image, nearby))


def _spread(length: int) -> list[int]:
    return sorted({0, length // 2, length - 1}) if length else []


class KeptColumns:
    """The columns of the input that the output keeps; their values are read when the rows are written."""

    def __init__(self, output: str) -> None:
        self._output = output

    @cached_property
    def schema(self) -> pa.Schema:
        """The names and types of the kept columns; empty if there are none."""
        with store.open_file(_locate_file(self._output, 0)) as file:
            columns = pq.read_schema(file)
        return pa.schema(list(columns.field(KEPT).type) if KEPT in columns.names else [])

    def read(self, rows: NDArray[np.int64]) -> list[pa.ChunkedArray]:
        """Return the columns of `schema` for sorted row numbers."""
        return list(take_rows(self._output, rows, [KEPT]).column(KEPT).flatten()) if len(self.schema) else []


def _read_group(output: str, group: int, columns: list[str]) -> pa.Table:
    groups_per_file = ROWS_PER_FILE // ROWS_PER_GROUP
    with store.open_file(_locate_file(output, group * ROWS_PER_GROUP)) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        return parquet.read_row_group(group % groups_per_file, columns=columns, use_threads=False)


def _locate_file(output: str, row: int) -> str:
    return store.join(output, _name_file(row))


def _name_file(row: int) -> str:
    return f"manifest/rows-{row // ROWS_PER_FILE * ROWS_PER_FILE:012}.parquet"


def _cut_files(tables: Iterable[pa.Table], first_row: int) -> Iterator[tuple[int, pa.Table]]:
    """Yield the rows in tables that end at multiples of ROWS_PER_FILE, each with the number of its first row."""
    waiting: list[pa.Table] = []
    start = first_row
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= (room := ROWS_PER_FILE - start % ROWS_PER_FILE):
            joined = pa.concat_tables(waiting)
            yield start, joined.slice(0, room)
            waiting, start = [joined.slice(room)], start + room
    if any(map(len, waiting)):
        yield start, pa.concat_tables(waiting)
