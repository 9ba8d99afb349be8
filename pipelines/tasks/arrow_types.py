"""Map JSON schemas to Arrow types, and JSON values to column values of these types."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from referencing.jsonschema import DRAFT202012

from ovis_model.grammar.json_schema import resolve_reference, walk_schemas

_INT64 = range(-(1 << 63), 1 << 63)
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "$ref"}

Json = Any


@dataclass(frozen=True)
class Shape:
    """An Arrow type and the conversion of JSON values to it. `convert` raises ValueError if a value does not fit."""

    type: pa.DataType
    convert: Callable[[Json], Any]


def infer_shape(schema: Json) -> Shape:
    """Return the shape of a schema: a struct for `properties`, a list for an array, JSON text if Arrow has no type."""
    return _infer_shape(schema, schema, ())


def close_objects(schema: Json) -> Json:
    """Return a schema whose objects allow only the properties that it names, unless it has keywords about others.

    JSON Schema would allow any other property, which no column could hold. A schema with `allOf` stays open, because
    each of its parts names only some properties of one object. So does an object with alternatives and `properties`.
    """
    closed = deepcopy(schema)
    if not any("allOf" in part for part in walk_schemas(closed)):
        _close(closed)
    return closed


def _close(schema: Json) -> None:
    if not isinstance(schema, dict):
        return
    is_object = "properties" in schema and schema.get("type", "object") == "object"
    if is_object and _list_alternatives(schema):
        return
    for part in DRAFT202012.subresources_of(schema):
        _close(part)
    if is_object and not schema.keys() & _OPEN:
        schema["additionalProperties"] = False


def _infer_shape(schema: Json, root: Json, above: tuple[str, ...]) -> Shape:
    if not isinstance(schema, Mapping):
        return _JSON_TEXT
    if "$ref" in schema:
        reference = schema["$ref"]
        return (
            _JSON_TEXT
            if reference in above
            else _infer_shape(resolve_reference(reference, root), root, (*above, reference))
        )
    if alternatives := _list_alternatives(schema):
        others = [part for part in alternatives if part != {"type": "null"}]
        is_one = len(others) == 1 and "properties" not in schema
        return _infer_shape(others[0], root, above) if is_one else _JSON_TEXT
    kind = _find_kind(schema)
    if kind == "object" and schema.get("properties") and isinstance(schema["properties"], Mapping):
        return _make_struct({name: _infer_shape(part, root, above) for name, part in schema["properties"].items()})
    if kind == "array" and isinstance(schema.get("items"), Mapping) and "prefixItems" not in schema:
        return _make_list(_infer_shape(schema["items"], root, above))
    return _SCALARS.get(kind, _JSON_TEXT)


def _list_alternatives(schema: Mapping[str, Json]) -> list[Json]:
    found = schema.get("anyOf", schema.get("oneOf"))
    return found if isinstance(found, list) else []


def _find_kind(schema: Mapping[str, Json]) -> str:
    """Return the only JSON type that a schema allows besides null, or "" if there are several."""
    if "enum" in schema or "const" in schema:
        values = _to_list(schema.get("enum", [schema.get("const")]))
        kinds = {_KIND_OF.get(type(value), "") for value in values if value is not None}
    else:
        given = schema.get("type", "object" if "properties" in schema else "")
        kinds = {given} if isinstance(given, str) else {kind for kind in _to_list(given) if isinstance(kind, str)}
    kinds -= {"null"}
    return kinds.pop() if len(kinds) == 1 else ""


def _to_list(value: Json) -> list[Json]:
    """Return a list unchanged, and [] for other values: `json_schema.parse_schema` reports them with their path."""
    return value if isinstance(value, list) else []


def _make_struct(fields: Mapping[str, Shape]) -> Shape:
    def convert(value: Json) -> Any:
        _expect(value, dict)
        return {name: _convert_or_null(shape, value.get(name)) for name, shape in fields.items()}

    return Shape(pa.struct([pa.field(name, shape.type) for name, shape in fields.items()]), convert)


def _make_list(items: Shape) -> Shape:
    def convert(value: Json) -> Any:
        _expect(value, list)
        return [_convert_or_null(items, item) for item in value]

    return Shape(pa.list_(items.type), convert)


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


_JSON_TEXT = Shape(pa.string(), lambda value: json.dumps(value, ensure_ascii=False))
_SCALARS = {
    "string": Shape(pa.string(), lambda value: _expect(value, str)),
    "boolean": Shape(pa.bool_(), lambda value: _expect(value, bool)),
    "integer": Shape(pa.int64(), _to_int64),
    "number": Shape(pa.float64(), _to_float64),
}
_KIND_OF = {str: "string", bool: "boolean", int: "integer", float: "number"}
