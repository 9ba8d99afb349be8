"""Describe Arrow columns as features of Hugging Face's `datasets`, so that images are images there."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

Json = dict[str, Any]


def describe_features(columns: pa.Schema) -> Json | None:
    """Return {column: feature}; None if a column has a type without a feature: then all types are inferred."""
    try:
        return {field.name: _describe(field) for field in columns}
    except KeyError:
        return None


def _describe(field: pa.Field) -> Json:
    type_ = field.type
    if field.name in ("image", "exported_image") and _is_image(type_):
        return {"_type": "Image"}
    if pa.types.is_list(type_) and _is_image(type_.value_type):
        return {"feature": {"_type": "Image"}, "_type": "List"}
    if pa.types.is_list(type_):
        return {"feature": _describe(pa.field("item", type_.value_type)), "_type": "List"}
    if pa.types.is_struct(type_):
        return {inner.name: _describe(inner) for inner in type_}
    return {"dtype": _DTYPES[str(type_)], "_type": "Value"}


def _is_image(type_: pa.DataType) -> bool:
    return pa.types.is_struct(type_) and [inner.name for inner in type_] == ["bytes", "path"]


_PLAIN = "string bool int8 int16 int32 int64 uint8 uint16 uint32 uint64"
_DTYPES = {
    **{name: name for name in _PLAIN.split()},
    "float": "float32",
    "double": "float64",
    "date32[day]": "date32",
    "large_string": "large_string",
    "timestamp[us, tz=UTC]": "timestamp[us, tz=UTC]",
    "decimal128(28, 10)": "decimal128(28, 10)",
}
