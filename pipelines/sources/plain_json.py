"""Read JSON lines as Arrow columns, for the plain case: objects whose wanted fields are texts and numbers.

What Arrow reads differently from Python's json, or what needs a rule of its own, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as pa_json

from pipelines.sources.columns import make_columns, refer_to_files
from pipelines.sources.conversations import SPECIAL_FIELDS
from pipelines.sources.image_columns import choose_image_columns
from pipelines.sources.json_elements import Element
from pipelines.sources.rows import MAX_DEPTH, Chunk, ColumnRoles

# Images as text, surrogates, a byte order mark, and a zero whose sign Python drops.
_SPECIAL = re.compile(rb"data:|\\u[dD]|\xef\xbb\xbf|-0\s*[,}\]]")
_MAX_BYTES = 4096  # a longer line may hold images as text
_KEPT = (pa.string(), pa.int64(), pa.bool_(), pa.float64(), pa.null())  # read as Python's json and pa.array do
_MAX_EXACT = 2**53  # integers among floats, and integers that Arrow reads as floats


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
    """Parse one object per line; return None if there is anything else, or a conversation."""
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
    if len(table) != len(lines) or not SPECIAL_FIELDS.isdisjoint(table.column_names):
        return None
    is_flat = not any(pa.types.is_nested(column.type) for column in table.columns)
    return table if is_flat or max(line.count(b"[") + line.count(b"{") for line in lines) <= MAX_DEPTH else None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _keep_columns(batch: pa.RecordBatch, names: Sequence[str]) -> pa.Table | None:
    """Return the kept columns, null where the objects have no such field; None for a type that needs a rule."""
    kept = {name: batch.column(name) if name in batch.schema.names else pa.nulls(len(batch)) for name in names}
    return pa.table(kept) if all(map(_is_kept_plainly, kept.values())) else None


def _is_kept_plainly(column: pa.Array) -> bool:
    if pa.types.is_floating(column.type) and pc.any(pc.greater_equal(pc.abs(column), _MAX_EXACT)).as_py():
        return False
    return column.type in _KEPT
