"""Map JSON schemas to Arrow types, and JSON values to column values of these types.

properties                  struct
additionalProperties: T     list of (key, value): not every reader has maps
items                       list
prefixItems                 list if all have one type, else a struct item_0, item_1 ...
date, date-time             date32, timestamp in UTC
pydantic's Decimal          decimal128
anything else               JSON text: values of several types, objects with names that are not known in advance
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from ovis_model.grammar import keywords
from ovis_model.grammar.dialects import resolve_pointer
from ovis_model.grammar.json_schema import check_schema
from pipelines.tasks.closing import close_objects

_INT64 = range(-(1 << 63), 1 << 63)

Json = Any


@dataclass(frozen=True)
class Shape:
    """An Arrow type and the conversion of JSON values to it. `convert` raises ValueError if a value does not fit."""

    type: pa.DataType
    convert: Callable[[Json], Any]


def infer_shape(schema: Json) -> Shape:
    """Return the shape of the answers to a schema, with its objects closed."""
    try:
        closed = close_objects(check_schema(schema))
    except ValueError:
        return _JSON_TEXT  # `guides.check` reports the fault before a run starts
    shape = _infer_shape(closed, closed, ())
    return Shape(shape.type, lambda value: _convert_or_null(shape, value))


def _infer_shape(schema: Json, root: Json, above: tuple[str, ...]) -> Shape:
    if not isinstance(schema, Mapping):
        return _JSON_TEXT
    if "$ref" in schema:
        reference = schema["$ref"]
        return (
            _JSON_TEXT
            if reference in above
            else _infer_shape(resolve_pointer(reference, root), root, (*above, reference))
        )
    kind = _find_kind(schema)
    if kind == "object" and isinstance(schema.get("properties"), Mapping) and is_closed(schema):
        return _make_struct({name: _infer_shape(part, root, above) for name, part in schema["properties"].items()})
    if (only := _find_only_part(schema)) is not None:
        return _infer_shape(only, root, above)
    if schema.keys() & {"anyOf", "oneOf", "allOf"}:
        return _JSON_TEXT
    if kind == "object":
        return _infer_map(schema, root, above)
    if kind == "array":
        return _infer_list(schema, root, above)
    if kind == "string":
        return _infer_text(schema)
    return _SCALARS.get(kind, _JSON_TEXT)


def is_closed(schema: Mapping[str, Json]) -> bool:
    """Return whether an object can only have the `properties` that it names."""
    return schema.get("additionalProperties") is False and "patternProperties" not in schema


def _find_only_part(schema: Mapping[str, Json]) -> Json | None:
    """Return the part that all values besides null match, if the schema is a union with null or `allOf` of one."""
    groups = [schema[name] for name in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(name), list)]
    if len(groups) != 1 or schema.keys() & {"properties", "items"}:
        return None
    others = [part for part in groups[0] if part != {"type": "null"}]
    return others[0] if len(others) == 1 else None


def _infer_map(schema: Mapping[str, Json], root: Json, above: tuple[str, ...]) -> Shape:
    patterns = list((schema.get("patternProperties") or {}).values())
    rest = schema.get("additionalProperties")
    values = [rest] if isinstance(rest, Mapping) and not patterns else patterns if rest is False else []
    if schema.get("properties") or len(values) != 1:
        return _JSON_TEXT
    return _make_map(_infer_shape(values[0], root, above))


def _infer_list(schema: Mapping[str, Json], root: Json, above: tuple[str, ...]) -> Shape:
    firsts, rest = schema.get("prefixItems") or [], schema.get("items")
    is_tuple = rest is False or 0 < schema.get("maxItems", len(firsts) + 1) <= len(firsts)
    shapes = [_infer_shape(part, root, above) for part in [*firsts, *[rest] * isinstance(rest, Mapping)]]
    if not shapes or not (is_tuple or isinstance(rest, Mapping)):
        return _JSON_TEXT
    if all(shape.type.equals(shapes[0].type) for shape in shapes):
        return _make_list(shapes)
    return _make_tuple(shapes[: len(firsts)]) if firsts and is_tuple else _JSON_TEXT


def _infer_text(schema: Mapping[str, Json]) -> Shape:
    if schema.get("pattern") in _DECIMAL_PATTERNS:
        return _DECIMAL
    return _FORMATS.get(str(schema.get("format")), _SCALARS["string"])


def _find_kind(schema: Mapping[str, Json]) -> str:
    """Return the only JSON type that a schema allows besides null, or "" if there are several."""
    if "enum" in schema or "const" in schema:
        values = _to_list(schema.get("enum", [schema.get("const")]))
        kinds = {_KIND_OF.get(type(value), "") for value in values if value is not None}
    else:
        given = schema.get("type", "")
        kinds = {given} if isinstance(given, str) else {kind for kind in _to_list(given) if isinstance(kind, str)}
    kinds -= {"null"}
    return kinds.pop() if len(kinds) == 1 else ""


def _to_list(value: Json) -> list[Json]:
    """Return a list unchanged, and [] for other values: `json_schema.parse_schema` reports them with their path."""
    return value if isinstance(value, list) else []


def _make_struct(fields: Mapping[str, Shape]) -> Shape:
    if not fields or len({name.lower() for name in fields}) < len(fields):
        return _JSON_TEXT  # DuckDB reads the wrong one of two fields whose names differ in case only

    def convert(value: Json) -> Any:
        if beyond := _expect(value, dict).keys() - fields.keys():
            raise ValueError(f"{min(beyond)!r} is not a property of the schema")
        return {name: _convert_or_null(shape, value.get(name)) for name, shape in fields.items()}

    return Shape(pa.struct([pa.field(name, shape.type) for name, shape in fields.items()]), convert)


def _make_map(values: Shape) -> Shape:
    def convert(value: Json) -> Any:
        return [{"key": key, "value": _convert_or_null(values, each)} for key, each in _expect(value, dict).items()]

    return Shape(pa.list_(pa.struct([pa.field("key", pa.string()), pa.field("value", values.type)])), convert)


def _make_list(items: Sequence[Shape]) -> Shape:
    """Return a list of items of one type; the last shape is that of all further items."""

    def convert(value: Json) -> Any:
        return [_convert_or_null(items[min(n, len(items) - 1)], item) for n, item in enumerate(_expect(value, list))]

    return Shape(pa.list_(items[0].type), convert)


def _make_tuple(items: Sequence[Shape]) -> Shape:
    names = [f"item_{number}" for number in range(len(items))]

    def convert(value: Json) -> Any:
        given = [*_expect(value, list), *[None] * len(items)]
        return {name: _convert_or_null(shape, each) for name, shape, each in zip(names, items, given, strict=False)}

    return Shape(pa.struct([pa.field(name, shape.type) for name, shape in zip(names, items, strict=True)]), convert)


def _convert_or_null(shape: Shape, value: Json) -> Any:
    return None if value is None else shape.convert(value)


def _expect(value: Json, *types: type) -> Any:
    if type(value) not in types:
        raise ValueError(f"{value!r} is not of type {types[0].__name__}")
    return value


def _to_int64(value: Json) -> int:
    if not _INT64.start <= _expect(value, int, float) < _INT64.stop or int(value) != value:
        raise ValueError(f"{value!r} does not fit an int64")
    return int(value)


def _to_float64(value: Json) -> float:
    try:
        return float(_expect(value, int, float))
    except OverflowError as error:
        raise ValueError("the number does not fit a float64") from error


def _to_timestamp(value: Json) -> datetime.datetime:
    return datetime.datetime.fromisoformat(_expect(value, str)).astimezone(datetime.UTC)


def _to_decimal(value: Json) -> Decimal:
    return Decimal(_expect(value, str))


def _to_json_text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


_JSON_TEXT = Shape(pa.string(), _to_json_text)
_SCALARS = {
    "string": Shape(pa.string(), lambda value: _expect(value, str)),
    "boolean": Shape(pa.bool_(), lambda value: _expect(value, bool)),
    "integer": Shape(pa.int64(), _to_int64),
    "number": Shape(pa.float64(), _to_float64),
}
_FORMATS = {
    "date": Shape(pa.date32(), lambda value: datetime.date.fromisoformat(_expect(value, str))),
    "date-time": Shape(pa.timestamp("us", tz="UTC"), _to_timestamp),
}
_DECIMAL_PATTERNS = {
    keywords.make_decimal_pattern(digits, places)
    for digits in range(keywords.DECIMAL_DIGITS + 1)
    for places in range(keywords.DECIMAL_PLACES + 1)
}
_DECIMAL = Shape(pa.decimal128(keywords.DECIMAL_DIGITS + keywords.DECIMAL_PLACES, keywords.DECIMAL_PLACES), _to_decimal)
_KIND_OF = {str: "string", bool: "boolean", int: "integer", float: "number"}
