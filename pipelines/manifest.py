"""The frozen input: every row's number, id and place, written once as OUTPUT/manifest and read by range."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import store
from pipelines.ledger import RowRange
from pipelines.schema import MANIFEST
from pipelines.sources import Item

ROWS_PER_GROUP = 1 << 12
ROWS_PER_FILE = 1 << 17


def write_manifest(output: str, items: Sequence[Item], prompt: str) -> None:
    """Row k is `items[k]`."""
    for start in range(0, len(items), ROWS_PER_FILE):
        table = _table(items[start : start + ROWS_PER_FILE], start, prompt)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=ROWS_PER_GROUP, compression="zstd")
        store.write_bytes(_file_of(output, start), buffer.getvalue())


def read_rows(output: str, rows: RowRange) -> pa.Table:
    """Schema MANIFEST. `rows` must lie within one row group: cut them at ROWS_PER_GROUP or a divisor of it."""
    first, last = rows.start // ROWS_PER_GROUP, (rows.stop - 1) // ROWS_PER_GROUP
    assert first == last, f"rows {rows} cross a row group of {ROWS_PER_GROUP}"
    groups_per_file = ROWS_PER_FILE // ROWS_PER_GROUP
    with store.open_file(_file_of(output, rows.start)) as file:
        table = pq.ParquetFile(file).read_row_group(first % groups_per_file)
    return table.slice(rows.start - first * ROWS_PER_GROUP, rows.stop - rows.start)


def _file_of(output: str, row: int) -> str:
    return store.join(output, "manifest", f"rows-{row // ROWS_PER_FILE * ROWS_PER_FILE:012}.parquet")


def _table(items: Sequence[Item], start: int, prompt: str) -> pa.Table:
    columns = {
        "row": range(start, start + len(items)),
        "id": [item.id for item in items],
        "uri": [item.uri for item in items],
        "num_bytes": [item.num_bytes for item in items],
        "prompt": [prompt] * len(items),
        "error": [item.error for item in items],
    }
    return pa.table({name: pa.array(values, MANIFEST.field(name).type) for name, values in columns.items()}, MANIFEST)
