"""The columns: of the frozen input, of what the stages hand on, and of the output."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Status = Literal["ok", "error"]
Stage = Literal["", "list", "read", "decode", "tile", "generate", "parse"]


def _column(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


ROW = "row"

MANIFEST = pa.schema(
    [
        _column(ROW, pa.int64()),  # row number
        _column("id", pa.string()),
        _column("uri", pa.string()),
        _column("num_bytes", pa.int64()),  # of the file as listed
        _column("prompt", pa.string()),
        _column("error", pa.string()),  # why the row cannot even be read, or ""
    ]
)

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

RESULT = OUTPUT.insert(0, MANIFEST.field(ROW))
"""What `Generate` hands to the driver: the output and the row number."""
