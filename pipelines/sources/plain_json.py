"""Read JSON lines as Arrow columns, for the plain case: flat objects, all with the same fields, none of them null.

What Arrow reads differently from Python's json, or what needs a rule of its own, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pyarrow import json as pa_json

from pipelines.sources.columns import make_columns, refer_to_files
from pipelines.sources.image_columns import choose_image_columns
from pipelines.sources.json_elements import Element
from pipelines.sources.rows import Chunk, ColumnRoles

_SPECIAL = re.compile(rb"data:|\\u[dD]|\xef\xbb\xbf")  # images as text, surrogates, a byte order mark
_MAX_BYTES = 4096  # a longer line may hold images as text
_KEPT = (pa.string(), pa.int64(), pa.bool_())  # read as Python's json and pa.array do


def make_plain_chunk(uri: str, elements: Sequence[Element], columns: ColumnRoles) -> Chunk | None:
    """Return the rows of some elements as columns; None if one is not plain. `columns`: with the names to use."""
    table = _read_objects([element.data for element in elements])
    if table is None or any(element.error for element in elements):
        return None
    batch = table.combine_chunks().to_batches()[0]
    image = columns.image
    if image is None:
        image, *others = choose_image_columns(dict.fromkeys(table.column_names, True)) or [""]
        if others or not image:
            return None
    images = refer_to_files(batch.column(image), uri) if image in table.column_names else None
    if (images is None) != (image == ""):
        return None
    numbers = np.array([element.number for element in elements])
    plain = make_columns(columns, uri, numbers, batch, images)
    kept = _keep_columns(batch, columns.keep)
    if plain is None or kept is None:
        return None
    return Chunk((), frozenset(table.column_names), kept if columns.keep else None, columns=plain)


def _read_objects(lines: Sequence[bytes]) -> pa.Table | None:
    """Parse one flat object per line; return None if there is anything else."""
    if not all(len(line) <= _MAX_BYTES and line[:1] == b"{" and line.rstrip()[-1:] == b"}" for line in lines):
        return None
    data = b"\n".join(lines)
    if _SPECIAL.search(data) or not _is_utf8(data):
        return None
    options = pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    try:
        table = pa_json.read_json(pa.BufferReader(data), options)
    except pa.ArrowException:
        return None
    is_flat = not any(pa.types.is_nested(column.type) or column.null_count for column in table.columns)
    return table if is_flat and len(table) == len(lines) else None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _keep_columns(batch: pa.RecordBatch, names: Sequence[str]) -> pa.Table | None:
    """Return the kept columns, null where the objects have no such field; None for a type that needs a rule."""
    kept = {name: batch.column(name) if name in batch.schema.names else pa.nulls(len(batch)) for name in names}
    is_plain = all(column.type in (*_KEPT, pa.null()) for column in kept.values())
    return pa.table(kept) if is_plain else None
