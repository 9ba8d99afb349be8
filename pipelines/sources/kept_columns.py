"""Convert kept columns of any Arrow type to types that the files of OUTPUT can store."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import SourceError

_IsType = Callable[[pa.DataType], bool]


def normalize_column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert one chunk of a kept column to common types, so that it can be merged with the other chunks.

    Views become plain, extension types and run ends their storage, and types without a Parquet form JSON text. Raise
    SourceError if a value cannot be converted.
    """
    return convert_column(name, column, normalize_type(column.type))


def convert_column(name: str, column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Convert a kept column to a type; a string type means JSON text unless the column holds strings already.

    Raise SourceError if a value cannot be converted.
    """
    if column.type == type_ or pa.types.is_null(column.type):
        return column
    try:
        if pa.types.is_string(type_) and not _holds_text(column.type):
            return pa.chunked_array([pa.array(map(_to_json, column.to_pylist()), type_)])
        if _contains(column.type, _cannot_be_cast):
            return pa.chunked_array([pa.array(column.to_pylist(), type_)])
        return column.cast(type_)
    except (ValueError, TypeError, OverflowError, KeyError, NotImplementedError) as error:
        raise SourceError(
            f"the kept column {name} ({column.type}) cannot be stored as {type_} ({error}); convert it or remove it "
            "from --keep-columns"
        ) from error


def find_stored_type(type_: pa.DataType) -> pa.DataType:
    """Return the type as which Parquet stores a column, a string (JSON text) if it has no form for it."""
    return _store_empty(type_) or pa.string()


@lru_cache
def _store_empty(type_: pa.DataType) -> pa.DataType | None:
    """Write and read a null of this type as the manifest does; None if one of the steps is not supported."""
    column, file = pa.StructArray.from_arrays([pa.nulls(1, type_)], fields=[pa.field("column", type_)]), io.BytesIO()
    try:
        pq.write_table(pa.table({"kept": column}).take([0]), file)
        return pq.read_schema(file).field("kept").type.field("column").type
    except (pa.ArrowException, OSError):
        return None


def normalize_type(type_: pa.DataType) -> pa.DataType:
    """Return the type that `normalize_column` converts to."""
    return pa.string() if _contains(type_, _needs_text) else _make_plain(type_)


def _needs_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_union(type_) or pa.types.is_interval(type_))


def _make_plain(type_: pa.DataType) -> pa.DataType:
    if isinstance(type_, pa.BaseExtensionType):
        return _make_plain(type_.storage_type)
    if pa.types.is_dictionary(type_):
        value = _make_plain(type_.value_type)
        return type_ if value == type_.value_type and not pa.types.is_nested(value) else value
    if pa.types.is_run_end_encoded(type_):
        return _make_plain(type_.value_type)
    if pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    return _make_plain_nested(type_)


def _make_plain_nested(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_map(type_):
        return pa.map_(_make_plain(type_.key_type), _make_plain(type_.item_type))
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_make_plain(field.type)) for field in type_])
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_make_plain_field(type_.value_field), type_.list_size)
    if pa.types.is_large_list(type_) or pa.types.is_large_list_view(type_):
        return pa.large_list(_make_plain_field(type_.value_field))
    if pa.types.is_list(type_) or pa.types.is_list_view(type_):
        return pa.list_(_make_plain_field(type_.value_field))
    return type_


def _make_plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_make_plain(field.type))


def _cannot_be_cast(type_: pa.DataType) -> bool:
    """Return whether Arrow's cast is missing or wrong: that of a sliced list view takes the wrong items."""
    is_list_view = pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_)
    is_encoded = pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_)
    return bool(is_list_view or is_encoded)


def _contains(type_: pa.DataType, is_wanted: _IsType) -> bool:
    return is_wanted(type_) or any(_contains(child, is_wanted) for child in _get_children(type_))


def _get_children(type_: pa.DataType) -> list[pa.DataType]:
    if isinstance(type_, pa.BaseExtensionType):
        return [type_.storage_type]
    if pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
        return [type_.value_type]
    return [type_.field(i).type for i in range(type_.num_fields)] if pa.types.is_nested(type_) else []


def _holds_text(type_: pa.DataType) -> bool:
    plain = _make_plain(type_)
    value = plain.value_type if pa.types.is_dictionary(plain) else plain
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value))


def _to_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)
