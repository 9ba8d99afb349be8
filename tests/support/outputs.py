"""Make result rows as a sink receives them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from pipelines import schema


def make_results(rows: Sequence[int], errors: Sequence[int] = ()) -> pa.Table:
    """Make result rows with these row numbers; those in `errors` are error rows."""
    return pa.Table.from_pylist(
        [_make_result(row, row in errors) for row in rows], schema.build_result_schema(schema.OUTPUT)
    )


def _make_result(row: int, is_error: bool) -> dict[str, object]:
    return {
        "row": row,
        "id": f"id-{row}",
        "uri": f"uri-{row}",
        "prompt": "",
        "text": "" if is_error else f"text {row}",
        "status": "error" if is_error else "ok",
        "stage": "decode" if is_error else "",
        "error": "why" if is_error else "",
        "finish_reason": "stop",
        "num_images": 1,
        "num_tiles": 1,
        "num_prompt_tokens": 5,
        "num_output_tokens": 2,
        "mean_logprob": math.nan if is_error else -1.0,
        "frame_timestamps_s": [],
    }
