"""Arrow's IPC format, as Hugging Face's `save_to_disk` writes it: a row is a row, images are left in their batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.media.reference import ByteRange, CellRef
from pipelines.sources.rows import ROWS_PER_CHUNK, Chunk, Columns, source_errors
from pipelines.sources.tables import Table
from pipelines.storage import store
from pipelines.storage.arrow_ipc import read_batch, read_schema
from pipelines.storage.store import FileInfo


def list_arrow(info: FileInfo, columns: Columns) -> Iterator[Chunk]:
    """List the rows of a stream. A local file is mapped, one in a store is read whole: streams have no index."""
    with source_errors(info.uri, " as an Arrow stream"), store.map_file(info.uri) as file:
        schema = read_schema(file)
        table = Table.of(info.uri, schema, columns)
        yield from _chunks(table, file, schema)


def _chunks(table: Table, file: Any, schema: pa.Schema) -> Iterator[Chunk]:
    at, begin = 0, file.tell()
    for message in _messages(file):
        end = file.tell()
        batch, place = read_batch(message, schema, table.read), ByteRange(begin, end - begin)
        for first in range(0, len(batch), ROWS_PER_CHUNK):
            numbers = range(first, min(len(batch), first + ROWS_PER_CHUNK))
            cells = [CellRef(table.uri, table.image or "", i, place) for i in numbers]
            yield table.chunk(batch.slice(first, len(numbers)), at + first, cells)
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
