"""Arrow schemas of the manifest, the results and the output."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Status = Literal["ok", "error"]
Stage = Literal["", "list", "read", "decode", "tile", "generate"]


def _make_field(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


ROW = "row"

_IMAGE = pa.struct(
    [
        _make_field("kind", pa.string()),  # how to read the image: see media.reference
        _make_field("uri", pa.string()),
        _make_field("offset", pa.int64()),  # bytes; -1: the whole file
        _make_field("num_bytes", pa.int64()),  # as listed; -1: unknown
        _make_field("member", pa.string()),  # name in a tar or column of a Parquet file, else ""
        _make_field("row", pa.int64()),  # row of a Parquet file, else -1
        _make_field("start_s", pa.float64()),  # window of a video: from here
        _make_field("stop_s", pa.float64()),  # up to here; infinity: to the end
    ]
)

MANIFEST = pa.schema(
    [
        _make_field(ROW, pa.int64()),  # row number
        _make_field("id", pa.string()),
        _make_field("uri", pa.string()),
        _make_field("images", pa.list_(pa.field("item", _IMAGE, nullable=False))),
        _make_field("prompt", pa.string()),  # with several tasks a JSON array
        _make_field("has_own_prompt", pa.bool_()),  # from the input, so it makes sense even without an image
        _make_field("error", pa.string()),  # why listing the row failed, or ""
    ]
)

ROWS_PER_GROUP = 1 << 12
"""Rows per row group of the manifest. A unit of work lies within one row group."""

KEPT = "kept"
"""The manifest's last column if the run keeps columns of its input: a struct with one field per kept column."""

OUTPUT = pa.schema(
    [
        _make_field("id", pa.string()),
        _make_field("uri", pa.string()),
        _make_field("prompt", pa.string()),
        _make_field("text", pa.string()),
        _make_field("status", pa.string()),
        _make_field("stage", pa.string()),
        _make_field("error", pa.string()),
        _make_field("finish_reason", pa.string()),
        _make_field("num_images", pa.int32()),
        _make_field("num_tiles", pa.int32()),
        _make_field("num_prompt_tokens", pa.int32()),
        _make_field("num_output_tokens", pa.int32()),
        _make_field("mean_logprob", pa.float32()),
        _make_field("frame_timestamps_s", pa.list_(pa.field("item", pa.float32(), nullable=False))),
    ]
)
"""Output of a captioning run."""

_ANSWER_COLUMNS = ("prompt", "text", "finish_reason", "mean_logprob")
ITEM = pa.schema([field for field in OUTPUT if field.name not in _ANSWER_COLUMNS])
"""Output of a run with tasks, before the columns of each task."""

WARNING = pa.schema([_make_field("warning", pa.string())])
"""Column on request: why a row with status `ok` may be doubtful, or ""."""

SAVED_FRAMES = pa.schema(
    [_make_field("saved_frames", pa.list_(pa.field("item", pa.string(), nullable=False)))],
)
"""Column on request: paths of the JPEG files of a row's images or frames in the directory of --save-frames."""

MEDIA = pa.schema(
    [
        pa.field("width", pa.int32()),  # px, upright
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("duration_s", pa.float64()),  # this and the following: videos only
        pa.field("fps", pa.float64()),
        pa.field("codec", pa.string()),
        pa.field("repeated_share", pa.float32()),  # of the wanted frames
        pa.field("corrupt_share", pa.float32()),
    ]
)
"""Columns on request about the row's image or video; null in error rows and where they do not apply."""


def build_result_schema(columns: pa.Schema) -> pa.Schema:
    """Return the schema of what `Generate` returns: the row number and the output columns except kept ones."""
    return columns.insert(0, MANIFEST.field(ROW))


def build_manifest_schema(kept: pa.Schema) -> pa.Schema:
    """Return the manifest's schema for a run that keeps these columns."""
    return MANIFEST.append(_make_field(KEPT, pa.struct(list(kept)))) if len(kept) else MANIFEST


def pack_struct(columns: list[pa.ChunkedArray], fields: pa.Schema) -> pa.Array:
    """Pack columns into one struct array, each cast to the type of its field."""
    arrays = [_cast(column.combine_chunks(), field.type) for column, field in zip(columns, fields, strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=list(fields))


def _cast(column: pa.Array, type_: pa.DataType) -> pa.Array:
    if column.type == type_:
        return column
    return pa.nulls(len(column), type_) if pa.types.is_null(column.type) else column.cast(type_)
