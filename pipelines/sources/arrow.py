"""Arrow's IPC format, as Hugging Face's `save_to_disk` writes it: a row is a row, images are left in their batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.errors import SourceError
from pipelines.media.reference import ImageRef
from pipelines.sources.rows import ROWS_PER_CHUNK, Chunk, Columns
from pipelines.sources.tables import Table
from pipelines.storage import store
from pipelines.storage.arrow_ipc import read_batch, read_schema
from pipelines.storage.store import FileInfo


def list_arrow(info: FileInfo, columns: Columns) -> Iterator[Chunk]:
    """A file is mapped, so of it only what is needed is read. One in a store is read whole: streams have no index."""
    try:
        with store.map_file(info.uri) as file:
            schema = read_schema(file)
            table = Table.of(info.uri, schema, columns)
            yield from _chunks(table, file, schema)
    except (OSError, EOFError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(
            f"cannot read {store.shown(info.uri)} as an Arrow stream: {str(error) or 'it is empty'}"
        ) from error


def _chunks(table: Table, file: Any, schema: pa.Schema) -> Iterator[Chunk]:
    at, begin = 0, file.tell()
    for message in _messages(file):
        end = file.tell()
        batch = read_batch(message, schema, table.read)
        for first in range(0, len(batch), ROWS_PER_CHUNK):
            numbers = range(first, min(len(batch), first + ROWS_PER_CHUNK))
            cells = [ImageRef("arrow", table.uri, begin, end - begin, table.image or "", i) for i in numbers]
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
