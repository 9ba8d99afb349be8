"""JSON schemas -> Arrow types, and JSON values -> what a column of such a type takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ovis_model.grammar.json_schema import resolved

_INT64 = range(-(1 << 63), 1 << 63)
_OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "$ref")
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_VALUES = ("enum", "const", "default", "examples")

Json = Any


@dataclass(frozen=True)
class Shape:
    """An Arrow type, and how a JSON value becomes one of its values. `convert` raises ValueError."""

    type: pa.DataType
    convert: Callable[[Json], Any]


def shape_of(schema: Json) -> Shape:
    """Objects with `properties` are structs, arrays lists; what Arrow has no type for is JSON text in a string."""
    return _shape(schema, schema, ())


def closed(schema: Json) -> Json:
    """The same schema, in which objects hold only the properties that it names, unless it speaks of others.

    JSON Schema would allow any others, which no column could hold. A schema with `allOf` is left as it is: its parts
    name some of the properties of one object each, and so is an object with alternatives beside its properties.
    """
    return schema if _has_key(schema, "allOf") else _closed(schema)


def _has_key(value: Json, name: str) -> bool:
    if isinstance(value, Mapping):
        return name in value or any(_has_key(part, name) for part in value.values())
    return isinstance(value, list) and any(_has_key(part, name) for part in value)


def _closed(schema: Json) -> Json:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    is_object = isinstance(schema.get("properties"), Mapping) and schema.get("type", "object") == "object"
    if is_object and _alternatives(schema):
        return schema  # each names some of the properties, as those of an `allOf`
    inner = {name: _closed_part(name, part) for name, part in schema.items()}
    return inner if not is_object or any(name in schema for name in _OPEN) else {**inner, "additionalProperties": False}


def _closed_part(keyword: str, part: Json) -> Json:
    if keyword in _OF_NAMES and isinstance(part, Mapping):
        return {name: _closed(schema) for name, schema in part.items()}
    return part if keyword in _OF_VALUES else _closed(part)


def _shape(schema: Json, root: Json, above: tuple[str, ...]) -> Shape:
    if not isinstance(schema, Mapping):
        return _JSON_TEXT
    if "$ref" in schema:
        reference = schema["$ref"]
        return _JSON_TEXT if reference in above else _shape(resolved(reference, root), root, (*above, reference))
    if alternatives := _alternatives(schema):
        others = [part for part in alternatives if part != {"type": "null"}]
        is_one = len(others) == 1 and "properties" not in schema
        return _shape(others[0], root, above) if is_one else _JSON_TEXT
    kind = _kind(schema)
    if kind == "object" and schema.get("properties") and isinstance(schema["properties"], Mapping):
        return _struct({name: _shape(part, root, above) for name, part in schema["properties"].items()})
    if kind == "array" and isinstance(schema.get("items"), Mapping) and "prefixItems" not in schema:
        return _list(_shape(schema["items"], root, above))
    return _SCALARS.get(kind, _JSON_TEXT)


def _alternatives(schema: Mapping[str, Json]) -> list[Json]:
    found = schema.get("anyOf", schema.get("oneOf"))
    return found if isinstance(found, list) else []


def _kind(schema: Mapping[str, Json]) -> str:
    """The one JSON type beside null that a schema allows, or ""."""
    if "enum" in schema or "const" in schema:
        values = _listed(schema.get("enum", [schema.get("const")]))
        kinds = {_KIND_OF.get(type(value), "") for value in values if value is not None}
    else:
        given = schema.get("type", "object" if "properties" in schema else "")
        kinds = {given} if isinstance(given, str) else {kind for kind in _listed(given) if isinstance(kind, str)}
    kinds -= {"null"}
    return kinds.pop() if len(kinds) == 1 else ""


def _listed(value: Json) -> list[Json]:
    """Nothing for what is no list: `json_schema.served` refuses such a schema, and knows where in it."""
    return value if isinstance(value, list) else []


def _struct(fields: Mapping[str, Shape]) -> Shape:
    def convert(value: Json) -> Any:
        _expect(value, dict)
        return {name: _or_null(shape, value.get(name)) for name, shape in fields.items()}

    return Shape(pa.struct([pa.field(name, shape.type) for name, shape in fields.items()]), convert)


def _list(items: Shape) -> Shape:
    def convert(value: Json) -> Any:
        _expect(value, list)
        return [_or_null(items, item) for item in value]

    return Shape(pa.list_(items.type), convert)


def _or_null(shape: Shape, value: Json) -> Any:
    return None if value is None else shape.convert(value)


def _expect(value: Json, *types: type) -> Any:
    if type(value) not in types:
        raise ValueError(f"{value!r} is no {types[0].__name__}")
    return value


def _int64(value: Json) -> int:
    if not _INT64.start <= _expect(value, int, float) < _INT64.stop or int(value) != value:
        raise ValueError(f"{value!r} does not fit an int64")
    return int(value)


def _float64(value: Json) -> float:
    try:
        return float(_expect(value, int, float))
    except OverflowError as error:
        raise ValueError("does not fit a float64") from error


_JSON_TEXT = Shape(pa.string(), lambda value: json.dumps(value, ensure_ascii=False))
_SCALARS = {
    "string": Shape(pa.string(), lambda value: _expect(value, str)),
    "boolean": Shape(pa.bool_(), lambda value: _expect(value, bool)),
    "integer": Shape(pa.int64(), _int64),
    "number": Shape(pa.float64(), _float64),
}
_KIND_OF = {str: "string", bool: "boolean", int: "integer", float: "number"}
