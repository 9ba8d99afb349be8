"""Decide from the Arrow type of a column whether its cells hold images as bytes, as URIs, or not at all."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Content = Literal["bytes", "uris", "nothing"]


def find_content(type_: pa.DataType) -> Content | None:
    """Return what cells of this type hold; "nothing" if all are null, None if they cannot hold images.

    Lists (not lists of lists) and dictionaries count as their values, extension types as their storage. A struct holds
    bytes in a field `bytes`, as Hugging Face's do, or a URI in a field `path`.
    """
    type_ = _unwrap(type_)
    if pa.types.is_null(type_):
        return "nothing"
    if pa.types.is_struct(type_):
        return _find_content_of_struct(type_)
    if _is_binary(type_) or pa.types.is_fixed_size_binary(type_):
        return "bytes"
    return "uris" if _is_text(type_) else None


def is_fixed_size(type_: pa.DataType) -> bool:
    """Return whether cells are bytes of one length, as hashes and UUIDs are more often than images."""
    return bool(pa.types.is_fixed_size_binary(_unwrap(type_)))


def is_struct(type_: pa.DataType) -> bool:
    """Return whether cells are structs or lists of structs."""
    return bool(pa.types.is_struct(_unwrap(type_)))


def _find_content_of_struct(type_: pa.DataType) -> Content | None:
    fields = {field.name: _unwrap(field.type, max_lists=0) for field in type_}
    data, path = fields.get("bytes"), fields.get("path")
    if data is not None and (_is_binary(data) or pa.types.is_fixed_size_binary(data) or _is_text(data)):
        return "bytes"
    if path is not None and _is_text(path):
        return "uris"
    is_empty = "bytes" in fields or "path" in fields
    return "nothing" if is_empty and all(map(pa.types.is_null, filter(None, (data, path)))) else None


def _unwrap(type_: pa.DataType, *, max_lists: int = 1) -> pa.DataType:
    """Return the type of the values in lists, dictionaries, run ends and extension types."""
    if isinstance(type_, pa.BaseExtensionType):
        return _unwrap(type_.storage_type, max_lists=max_lists)
    if pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
        return _unwrap(type_.value_type, max_lists=max_lists)
    return _unwrap(type_.value_type, max_lists=max_lists - 1) if _is_list(type_) and max_lists else type_


def _is_list(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
        or pa.types.is_list_view(type_)
        or pa.types.is_large_list_view(type_)
    )


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))
