"""Arrow's IPC format, as Hugging Face's `save_to_disk` writes it: a row is a row, images are left in their batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines import store
from pipelines.sources.rows import ROWS_PER_CHUNK, Chunk, Columns, ImageRef, SourceError
from pipelines.sources.tables import Table
from pipelines.store import FileInfo

_FILE_START = b"ARROW1\0\0"  # of the file format, which is a stream with an index behind it


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


def read_schema(file: Any) -> pa.Schema:
    """Leaves `file` at the first batch. Raises ArrowException or SourceError."""
    if file.read(len(_FILE_START)) != _FILE_START:
        file.seek(0)
    schema = pa.ipc.read_schema(_checked(pa.ipc.read_message(file), "schema"))
    if any(pa.types.is_dictionary(field.type) for field in schema):
        raise SourceError("Arrow streams with dictionaries are not read; save the dataset as Parquet")
    return schema


def read_batch(message: pa.ipc.Message, schema: pa.Schema, names: list[str]) -> pa.RecordBatch:
    """The columns `names`, checked: what points out of a damaged batch would end the process."""
    batch = pa.ipc.read_record_batch(_checked(message, "record batch"), schema).select(names)
    batch.validate(full=True)
    return batch


def _checked(message: pa.ipc.Message, type_: str) -> pa.ipc.Message:
    """Arrow reads a message of any type as what it is asked for, and ends the process."""
    if message.type != type_:
        raise pa.ArrowInvalid(f"a message of type {message.type!r} where one of type {type_!r} belongs")
    return message


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
