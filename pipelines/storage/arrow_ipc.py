"""Validate messages of Arrow's IPC format before Arrow reads them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

_FILE_START = b"ARROW1\0\0"  # of the file format, which is a stream followed by an index


def read_schema(file: Any) -> pa.Schema:
    """Read the schema and leave `file` at the first batch. Raise ArrowException."""
    if file.read(len(_FILE_START)) != _FILE_START:
        file.seek(0)
    return pa.ipc.read_schema(_check_type(pa.ipc.read_message(file), "schema"))


def read_batch(message: pa.ipc.Message, schema: pa.Schema) -> pa.RecordBatch:
    """Read a batch; before use, `select_columns` must validate the columns."""
    return pa.ipc.read_record_batch(_check_type(message, "record batch"), schema)


def select_columns(batch: pa.RecordBatch, names: list[str]) -> pa.RecordBatch:
    """Return the columns `names`, validated: an offset beyond a damaged batch's end would crash the process."""
    selected = batch.select(names)
    selected.validate(full=True)
    return selected


def _check_type(message: pa.ipc.Message, type_: str) -> pa.ipc.Message:
    """Return the message if it has this type. Arrow would read any other as this type and crash the process."""
    if message.type != type_:
        raise pa.ArrowInvalid(f"a message has the type {message.type!r} instead of {type_!r}")
    return message
