"""Repair AVIF files that older encoders wrote, so that libavif accepts them.

The specification allows one box of properties (`ipma`) per version and flags. Early files with an alpha plane have one
for each plane, and libavif, which Pillow uses, refuses them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER_BYTES = 8  # of a box: its length and its type
_FULL_BYTES = 16  # header, version with flags, number of entries


class _Box(NamedTuple):
    kind: bytes
    start: int
    body: int
    stop: int


def merge_property_boxes(data: bytes) -> bytes:
    """Return the file with one `ipma` box instead of several; all lengths and offsets stay the same."""
    properties = _find_box(data, b"meta", b"iprp", skip=4)
    if properties is None:
        return data
    boxes = list(_list_boxes(data, properties.body, properties.stop))
    associations = [box for box in boxes if box.kind == b"ipma" and box.stop - box.start >= _FULL_BYTES]
    if len(associations) < 2 or len({data[box.body : box.body + 4] for box in associations}) > 1:
        return data
    others = b"".join(data[box.start : box.stop] for box in boxes if box not in associations)
    body = others + _merge(data, associations)
    # A free box after the shorter one keeps the offsets; libavif accepts no free box inside it.
    spare = properties.stop - properties.body - len(body)
    merged = _make_box(b"iprp", body) + _make_box(b"free", bytes(spare - _HEADER_BYTES))
    return data[: properties.start] + merged + data[properties.stop :]


def _merge(data: bytes, boxes: list[_Box]) -> bytes:
    """Return one `ipma` box with the entries of all."""
    version = data[boxes[0].body : boxes[0].body + 4]
    count = sum(int.from_bytes(data[box.body + 4 : box.body + 8], "big") for box in boxes)
    entries = b"".join(data[box.start + _FULL_BYTES : box.stop] for box in boxes)
    return _make_box(b"ipma", version + struct.pack(">I", count & 0xFFFFFFFF) + entries)


def _make_box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", _HEADER_BYTES + len(body), kind) + body


def _find_box(data: bytes, outer: bytes, inner: bytes, *, skip: int) -> _Box | None:
    """Return the box `inner` of the box `outer`, whose own fields take `skip` bytes; None if one is missing."""
    found = next((box for box in _list_boxes(data, 0, len(data)) if box.kind == outer), None)
    inside = _list_boxes(data, found.body + skip, found.stop) if found else ()
    return next((box for box in inside if box.kind == inner), None)


def _list_boxes(data: bytes, start: int, stop: int) -> Iterator[_Box]:
    """Yield the boxes between two offsets, up to the first whose length is damaged."""
    while start + _HEADER_BYTES <= stop:
        length, kind = struct.unpack_from(">I4s", data, start)
        if not _HEADER_BYTES <= length <= stop - start:
            return
        yield _Box(kind, start, start + _HEADER_BYTES, start + length)
        start += length
