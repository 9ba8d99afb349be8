"""The part of JSON Schema (draft 2020-12) that answers can be held to exactly, checked keyword by keyword.

What is not in the table below is refused, never ignored; what the grammar library honours only almost is rewritten so
that every answer is valid by the schema as it was given, though not every valid answer can be given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ovis_model.grammar.regex import check_pattern

MAX_SCHEMA_CHARS = 1 << 17
MAX_DEPTH = 64  # of names and places in a path from the root
MAX_COUNT = 1_000_000
MAX_SAFE_INTEGER = 2**53 - 1  # RFC 8259, section 6: what all readers of JSON agree about
_DIGITS = 15  # of a decimal number that survive any reader

Json = dict[str, Any]

_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")

_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_ANNOTATIONS = frozenset(
    {"$comment", "contentEncoding", "contentMediaType", "default", "deprecated", "description", "discriminator"}
    | {"examples", "readOnly", "title", "writeOnly"}
)
_ROOT_ANNOTATIONS = frozenset({"$id", "$schema"})

_DATE = (
    r"(?:[12][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[12][0-9](?:0[48]|[2468][048]|[13579][26])|(?:12|16|20|24|28)00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_EXACT_FORMATS = {  # years 1000 to 2999, no leap seconds: what every calendar library reads
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "time": f"^{_TIME}$",
}
_FORMATS = frozenset({*_EXACT_FORMATS, "duration", "email", "ipv4", "ipv6", "uri", "uuid"})


def served(text: str) -> Json:
    """The schema to hand to the grammar library. Raises ValueError with the path and the keyword that is not served.

    Integers stay within those that a double holds exactly, whatever the bounds.
    """
    schema = _checked(_parsed(text), "#")
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is an object; this is {schema!r}")
    for where, part in _subschemas(schema, "#"):
        _check_min_properties(part, where)
        _tighten(part)
        if "anyOf" not in part and _are_told_apart(part.get("oneOf", []), schema):
            part["anyOf"] = part.pop("oneOf")  # the same, as no value matches two; the library follows no references
    return schema


def resolved(reference: Any, root: Any) -> Any:
    """What "#/$defs/name" names in the schema `root`; None for anything else."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for name in filter(None, reference.removeprefix("#").split("/")):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _parsed(text: str) -> Any:
    if len(text) > MAX_SCHEMA_CHARS:
        raise ValueError(f"a schema of {len(text)} characters is over the limit of {MAX_SCHEMA_CHARS}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema is not JSON: {error}") from None


def _checked(schema: Any, where: str) -> Json | bool:
    """A copy that holds only what constrains."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise _fault(where, schema, "a schema: an object, true or false")
    dropped = _ANNOTATIONS | _ROOT_ANNOTATIONS if where == "#" else _ANNOTATIONS
    result = {}
    for name, value in schema.items():
        if name not in dropped:
            if name not in _KEYWORDS:
                raise ValueError(f"{where}: the keyword {name!r} is not served")
            result[name] = _KEYWORDS[name](value, _at(where, name))
    return result


def _at(where: str, name: object) -> str:
    path = f"{where}/{str(name).replace('~', '~0').replace('/', '~1')}"
    if path.count("/") > MAX_DEPTH:
        raise ValueError(f"a schema more than {MAX_DEPTH} names deep is not served: {path[:80]}...")
    return path


def _fault(where: str, value: object, wanted: str) -> ValueError:
    return ValueError(f"{where}: {str(value)[:80]!r} must be {wanted}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _fault(where, value, "a list that is not empty")
    return value


def _schemas(value: Any, where: str) -> list[Json | bool]:
    return [_checked(schema, _at(where, place)) for place, schema in enumerate(_list(value, where))]


def _named_schemas(value: Any, where: str) -> dict[str, Json | bool]:
    if not isinstance(value, dict):
        raise _fault(where, value, "an object of schemas")
    return {_text(name, where): _checked(schema, _at(where, name)) for name, schema in value.items()}


def _patterned_schemas(value: Any, where: str) -> dict[str, Json | bool]:
    schemas = _named_schemas(value, where)
    for pattern in schemas:
        _pattern(pattern, where)
    return schemas


def _count(value: Any, where: str) -> int:
    if not _is_number(value) or not 0 <= value <= MAX_COUNT or value % 1:
        raise _fault(where, value, f"a whole number from 0 to {MAX_COUNT}")
    return int(value)


def _number(value: Any, where: str) -> int | float:
    """One that no reader of JSON rounds."""
    if _is_number(value) and abs(value) <= MAX_SAFE_INTEGER:
        if isinstance(value, int) or value.is_integer():
            return int(value)
        if float(f"{value:.{_DIGITS}g}") == value and abs(value) >= 10**-_DIGITS:
            return float(value)
    raise _fault(where, value, f"a number within ±{MAX_SAFE_INTEGER} of at most {_DIGITS} digits")


def _lower(value: Any, where: str) -> int | float:
    """A bound further out than all safe integers says no more than they do."""
    return -MAX_SAFE_INTEGER if _is_number(value) and value < -MAX_SAFE_INTEGER else _number(value, where)


def _upper(value: Any, where: str) -> int | float:
    return MAX_SAFE_INTEGER if _is_number(value) and value > MAX_SAFE_INTEGER else _number(value, where)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _multiple(value: Any, where: str) -> int:
    number = _number(value, where)
    if number <= 0 or number % 1:
        raise _fault(where, value, "a whole number: multiples of others are not exact in binary")
    return int(number)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _fault(where, value, "a string")
    if _UNWRITABLE.search(value):
        raise _fault(where, value, "text without control characters and lone surrogates")
    return value


def _value(value: Any, where: str) -> Any:
    """Of `const` or in `enum`."""
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, list):
        return [_value(item, _at(where, place)) for place, item in enumerate(value)]
    if isinstance(value, dict):
        return {_text(name, where): _value(item, _at(where, name)) for name, item in value.items()}
    return value if value is None or isinstance(value, bool) else _number(value, where)


def _values(value: Any, where: str) -> list[Any]:
    return [_value(item, _at(where, place)) for place, item in enumerate(_list(value, where))]


def _names(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise _fault(where, value, "a list of names")
    return [_text(name, where) for name in value]


def _type(value: Any, where: str) -> Any:
    for name in [value] if isinstance(value, str) else _list(value, where):
        if not isinstance(name, str) or name not in _TYPES:
            raise _fault(where, name, f"one of {', '.join(sorted(_TYPES))}")
    return value


def _pattern(value: Any, where: str) -> str:
    try:
        check_pattern(_text(value, where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return str(value)


def _format(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in _FORMATS:
        raise _fault(where, value, f"a format that is served: {', '.join(sorted(_FORMATS))}")
    return str(value)


def _reference(value: Any, where: str) -> str:
    if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
        raise _fault(where, value, "a path in this schema, such as #/$defs/name; others are not fetched")
    return value


_KEYWORDS: dict[str, Callable[[Any, str], Any]] = {
    "$defs": _named_schemas,
    "$ref": _reference,
    "additionalProperties": _checked,
    "allOf": _schemas,
    "anyOf": _schemas,
    "const": _value,
    "definitions": _named_schemas,
    "enum": _values,
    "exclusiveMaximum": _upper,
    "exclusiveMinimum": _lower,
    "format": _format,
    "items": _checked,
    "maxItems": _count,
    "maxLength": _count,
    "maxProperties": _count,
    "maximum": _upper,
    "minItems": _count,
    "minLength": _count,
    "minProperties": _count,
    "minimum": _lower,
    "multipleOf": _multiple,
    "oneOf": _schemas,
    "pattern": _pattern,
    "patternProperties": _patterned_schemas,
    "prefixItems": _schemas,
    "properties": _named_schemas,
    "required": _names,
    "type": _type,
}


def _subschemas(schema: Json | bool, where: str) -> Iterator[tuple[str, Json]]:
    """Itself and all in it, with their paths."""
    if isinstance(schema, bool):
        return
    yield where, schema
    for name, value in schema.items():
        check = _KEYWORDS[name]
        if check is _checked:
            yield from _subschemas(value, f"{where}/{name}")
        elif check is _schemas:
            for place, item in enumerate(value):
                yield from _subschemas(item, f"{where}/{name}/{place}")
        elif check in (_named_schemas, _patterned_schemas):
            for key, item in value.items():
                yield from _subschemas(item, f"{where}/{name}/{key}")


def _check_min_properties(schema: Json, where: str) -> None:
    """Names of properties that the schema does not list may come twice, and then count once."""
    is_closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    if schema.get("minProperties", 0) > 1 and not is_closed:
        raise ValueError(
            f"{where}: the keyword 'minProperties' over 1 is served beside additionalProperties: false only"
        )


def _are_told_apart(schemas: list[Json | bool], root: Json) -> bool:
    """By a tag: a property that each requires, with other constants in each."""
    tags = [_tags(schema, root) for schema in schemas]
    for name in set(tags[0]).intersection(*tags[1:]) if tags else ():
        values = [value for tag in tags for value in tag[name]]
        if len(values) == len(set(values)):
            return True
    return False


def _tags(schema: Any, root: Json) -> dict[str, set[str]]:
    """Of the properties that an object must have: those of few values, and these as JSON."""
    for _ in range(MAX_DEPTH):  # a reference to itself has none
        if isinstance(schema, dict) and "$ref" in schema:
            schema = resolved(schema["$ref"], root)
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return {}
    parts = {name: part for name, part in schema.get("properties", {}).items() if isinstance(part, dict)}
    return {
        name: {json.dumps(value, sort_keys=True) for value in part.get("enum", [part.get("const")])}
        for name, part in parts.items()
        if name in schema.get("required", ()) and ("enum" in part or "const" in part)
    }


def _tighten(schema: Json) -> None:
    types = schema.get("type", ())
    types = [types] if isinstance(types, str) else types
    if "integer" in types and "number" not in types:
        _bound_integers(schema)
    if types != ["integer"]:
        _include_bounds(schema)
    if pattern := _EXACT_FORMATS.get(schema.get("format", "")):
        del schema["format"]
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": pattern}]


def _bound_integers(schema: Json) -> None:
    if "exclusiveMinimum" not in schema:
        schema.setdefault("minimum", -MAX_SAFE_INTEGER)
    if "exclusiveMaximum" not in schema:
        schema.setdefault("maximum", MAX_SAFE_INTEGER)


def _include_bounds(schema: Json) -> None:
    """A number of many digits next to an exclusive bound would be rounded to the bound by its reader."""
    if (bound := schema.pop("exclusiveMinimum", None)) is not None:
        schema["minimum"] = max(schema.get("minimum", -math.inf), _next_to(bound, 1))
    if (bound := schema.pop("exclusiveMaximum", None)) is not None:
        schema["maximum"] = min(schema.get("maximum", math.inf), _next_to(bound, -1))


def _next_to(bound: float, sign: int) -> float:
    """The next one of fewer digits than readers keep."""
    return float(f"{bound + sign * max(abs(bound), 1e-3) * 1e-12:.{_DIGITS}g}")
