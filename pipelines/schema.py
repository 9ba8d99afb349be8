"""Arrow schemas of the manifest, of results and of the output."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Status = Literal["ok", "error"]
Stage = Literal["", "list", "read", "decode", "tile", "generate"]


def _column(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


ROW = "row"

_IMAGE = pa.struct(
    [
        _column("kind", pa.string()),  # how to read it: media.reference
        _column("uri", pa.string()),
        _column("offset", pa.int64()),  # bytes; -1: the whole file
        _column("num_bytes", pa.int64()),  # as listed; -1: unknown
        _column("member", pa.string()),  # name in a tar, column of a Parquet file, else ""
        _column("row", pa.int64()),  # of a Parquet file, else -1
        _column("start_s", pa.float64()),  # of a video: from here
        _column("stop_s", pa.float64()),  # up to here, infinity for all of it
    ]
)

MANIFEST = pa.schema(
    [
        _column(ROW, pa.int64()),  # row number
        _column("id", pa.string()),
        _column("uri", pa.string()),
        _column("images", pa.list_(pa.field("item", _IMAGE, nullable=False))),
        _column("prompt", pa.string()),  # of several tasks a JSON array
        _column("has_own_prompt", pa.bool_()),  # from the input, so that it means something without an image
        _column("error", pa.string()),  # why the row cannot even be read, or ""
    ]
)

ROWS_PER_GROUP = 1 << 12
"""Rows of a row group of the manifest: a unit of work lies within one."""

KEPT = "kept"
"""The manifest's last column if the run keeps columns of its input: a struct of them."""

OUTPUT = pa.schema(
    [
        _column("id", pa.string()),
        _column("uri", pa.string()),
        _column("prompt", pa.string()),
        _column("text", pa.string()),
        _column("status", pa.string()),
        _column("stage", pa.string()),
        _column("error", pa.string()),
        _column("finish_reason", pa.string()),
        _column("num_images", pa.int32()),
        _column("num_tiles", pa.int32()),
        _column("num_prompt_tokens", pa.int32()),
        _column("num_output_tokens", pa.int32()),
        _column("mean_logprob", pa.float32()),
        _column("frame_timestamps_s", pa.list_(pa.field("item", pa.float32(), nullable=False))),
    ]
)
"""Of a run that captions."""

_OF_THE_ANSWER = ("prompt", "text", "finish_reason", "mean_logprob")
ITEM = pa.schema([field for field in OUTPUT if field.name not in _OF_THE_ANSWER])
"""Of a run with several tasks, before the columns of each."""


def result(columns: pa.Schema) -> pa.Schema:
    """What `Generate` hands to the driver: the row number and the columns of the output but for those kept."""
    return columns.insert(0, MANIFEST.field(ROW))


def manifest(kept: pa.Schema) -> pa.Schema:
    """MANIFEST of a run that keeps these columns."""
    return MANIFEST.append(_column(KEPT, pa.struct(list(kept)))) if len(kept) else MANIFEST


def struct_of(columns: list[pa.ChunkedArray], fields: pa.Schema) -> pa.Array:
    """Columns as one of structs, each cast to the type of its field."""
    arrays = [_cast(column.combine_chunks(), field.type) for column, field in zip(columns, fields, strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=list(fields))


def _cast(column: pa.Array, type_: pa.DataType) -> pa.Array:
    if column.type == type_:
        return column
    return pa.nulls(len(column), type_) if pa.types.is_null(column.type) else column.cast(type_)
