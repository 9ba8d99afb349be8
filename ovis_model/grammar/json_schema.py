"""Check JSON schemas, rewrite them for the grammar library, and validate answers against them.

Every answer is valid by the schema as it was given, though not every valid answer can be given. The rewrites mend what
llguidance 1.9.1 honours only almost; it refuses the combinations of keywords that it cannot compile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.validators import extend
from referencing.jsonschema import DRAFT202012

from ovis_model.grammar import keywords
from ovis_model.grammar.dialects import translate_schema
from ovis_model.grammar.keywords import MAX_SAFE_INTEGER
from ovis_model.grammar.open_values import spell_out
from ovis_model.grammar.regex import check_pattern
from ovis_model.grammar.unions import follow, separate_parts

Json = dict[str, Any]

MAX_SCHEMA_CHARS = 1 << 20
MAX_DEPTH = 64  # of objects and lists within each other


def parse_schema(text: str) -> Json:
    """Return the schema. Raise ValueError with the place and the keyword that is not supported."""
    if len(text) > MAX_SCHEMA_CHARS:
        raise ValueError(f"a schema of {len(text)} characters is over the limit of {MAX_SCHEMA_CHARS}")
    try:
        schema = json.loads(text, parse_float=_parse_float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema is not JSON: {error}") from None
    return check_schema(schema)


def check_schema(schema: Any) -> Json:
    """Return the translation of a schema. Raise ValueError as `parse_schema` does."""
    if _is_deeper(schema, MAX_DEPTH):
        raise ValueError(f"a schema more than {MAX_DEPTH} names deep is not supported")
    schema = translate_schema(schema).schema
    if fault := next(_TABLE.iter_errors(schema), None):
        raise ValueError(_describe(fault))
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is an object; this is {schema}")
    return schema


def find_ignored(text: str) -> tuple[str, ...]:
    """Return the words of a schema that have no effect on answers and that JSON Schema does not have."""
    return translate_schema(json.loads(text)).dropped


def adapt_schema(schema: Json) -> Json:
    """Return the schema for llguidance to compile."""
    adapted = spell_out(schema, walk_schemas(schema))
    for part in list(walk_schemas(adapted)):
        _rewrite(part, schema)
    return adapted


def drop_repeats(value: Any, schema: str) -> Any:
    """Return the value without repeated items where the schema has `uniqueItems`, which no grammar can hold."""
    root = _validator(schema).schema
    return _drop_repeats(value, root, root) if '"uniqueItems"' in schema else value


def _drop_repeats(value: Any, part: Any, root: Json) -> Any:
    part = follow(part, root)
    if not isinstance(part, dict) or not isinstance(value, list | dict):
        return value
    for name in ("anyOf", "oneOf", "allOf"):
        for branch in part.get(name, ()):
            value = _drop_repeats(value, branch, root)
    if isinstance(value, dict):
        inner = part.get("properties", {})
        rest = part.get("additionalProperties")
        return {name: _drop_repeats(each, inner.get(name, rest), root) for name, each in value.items()}
    firsts = part.get("prefixItems", ())
    items = [
        _drop_repeats(each, firsts[number] if number < len(firsts) else part.get("items"), root)
        for number, each in enumerate(value)
    ]
    return list({_write_canonically(item): item for item in items}.values()) if part.get("uniqueItems") else items


def _write_canonically(value: Any) -> str:
    """Return a text that is the same for equal values: JSON Schema has one 1, which may be written 1.0."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_parse_float), sort_keys=True)


def validate_answer(value: Any, schema: str) -> None:
    """Raise ValueError if the schema forbids the value. Patterns and formats are left to the grammar."""
    if error := next(_validator(schema).iter_errors(value), None):
        raise ValueError(error.message)


def walk_schemas(schema: Any) -> Iterator[Json]:
    """Yield the schema and all schemas in it, except true and false."""
    if isinstance(schema, dict):
        yield schema
        for part in DRAFT202012.subresources_of(schema):
            yield from walk_schemas(part)


def _parse_float(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number  # llguidance refuses 2.0 as a count


def _is_deeper(value: Any, depth: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_is_deeper(part, depth - 1) for part in parts)


def _describe(error: ValidationError) -> str:
    place = "/".join(["#", *(str(name).replace("~", "~0").replace("/", "~1") for name in error.absolute_path)])
    if error.cause:
        return f"{place}: {error.cause}"
    if error.validator == "additionalProperties":
        unknown = next(name for name in error.instance if name not in keywords.SUPPORTED["properties"])
        return f"{place}: the keyword {unknown!r} is not supported"
    return f"{place}: {str(error.instance)[:80]!r} must be {error.schema['title']}"


def _is_exact(value: Any) -> bool:
    """Return whether no reader of JSON rounds the number."""
    if not isinstance(value, float) or value.is_integer() or abs(value) > MAX_SAFE_INTEGER:
        return True
    return float(f"{value:.{keywords.MAX_DIGITS}g}") == value and abs(value) >= 10**-keywords.MAX_DIGITS


def _is_pattern(value: Any) -> bool:
    check_pattern(value)
    return True


_CHECKS = FormatChecker(())
_CHECKS.checkers = {"decimal": (_is_exact, ()), "pattern": (_is_pattern, ValueError)}
_TABLE = Draft202012Validator(keywords.SUPPORTED, format_checker=_CHECKS)


def _skip(validator: Any, part: Any, value: Any, schema: Json) -> tuple[()]:
    return ()


def _check_additional(validator: Any, part: Any, value: Any, schema: Json) -> Any:
    return () if "patternProperties" in schema else _KEYWORDS["additionalProperties"](validator, part, value, schema)


_KEYWORDS = Draft202012Validator.VALIDATORS
# llguidance matches patterns in linear time; Python's `re` may need exponential time, and would halt a replica.
_NO_PATTERNS = {"pattern": _skip, "patternProperties": _skip, "additionalProperties": _check_additional}
# The parts of a `oneOf` that was compiled exclude each other, but not without their patterns.
_Validator: Any = extend(Draft202012Validator, {**_NO_PATTERNS, "oneOf": _KEYWORDS["anyOf"]})


@lru_cache
def _validator(schema: str) -> Any:
    return _Validator(parse_schema(schema))


def _rewrite(part: Json, root: Json) -> None:
    for name in keywords.IGNORED:
        part.pop(name, None)  # a `$ref` may not lead there: their values are not checked
    parts = separate_parts(part["oneOf"], root, part.get("type")) if "oneOf" in part and "anyOf" not in part else None
    if parts is not None:
        del part["oneOf"]
        part["anyOf"] = parts
    if pattern := keywords.EXACT_FORMATS.get(part.get("format", "")):
        del part["format"]
        part["allOf"] = [*part.get("allOf", ()), {"pattern": pattern}]
    if part.pop("uniqueItems", False) and (values := _list_values(part.get("items"), root)):
        part["maxItems"] = min(len(values), part.get("maxItems", len(values)))  # or the answer repeats them for ever
    types = part.get("type", ())
    _bound(part, [types] if isinstance(types, str) else types)


def _bound(part: Json, types: Sequence[str]) -> None:
    """Bound the digits of numbers; replace bounds beyond 64 bits, on which llguidance fails, and exclusive ones."""
    is_decimal = "number" in types and not part.keys() & {"enum", "const"}
    places = max(_MIN_PLACES, *map(_count_places, _list_bounds(part)), 0)
    if {"integer", "number"} & {*types} and not part.keys() & {"enum", "const"}:
        part.update({"minimum": -MAX_SAFE_INTEGER, "maximum": MAX_SAFE_INTEGER, **part})
    for inclusive, exclusive, sign, tighter in _BOUNDS:
        for name in part.keys() & {inclusive, exclusive}:
            part[name] = tighter(part[name], -sign * MAX_SAFE_INTEGER)
        if types != ["integer"] and exclusive in part:
            inside = _next_to(part.pop(exclusive), sign)
            part[inclusive] = tighter(inside, part.get(inclusive, inside))
    if is_decimal and places <= _MAX_PLACES:
        part.setdefault("multipleOf", float(f"1e-{places}"))


_MIN_PLACES = 6  # of decimals that numbers may have, or those of a bound and two more
_MAX_PLACES = 9  # for which the library can count
_BOUNDS: Any = (("minimum", "exclusiveMinimum", 1, max), ("maximum", "exclusiveMaximum", -1, min))


def _list_bounds(part: Json) -> list[float]:
    return [part[name] for bound in _BOUNDS for name in bound[:2] if name in part]


def _count_places(bound: float) -> int:
    """Return the decimals of a number, and two more."""
    return max(0, -int(Decimal(repr(bound)).normalize().as_tuple().exponent)) + 2


def _next_to(bound: float, sign: int) -> float:
    """Return the next number of fewer digits than readers keep."""
    return float(f"{bound + sign * max(abs(bound), 1e-3) * 1e-12:.{keywords.MAX_DIGITS}g}")


def _list_values(part: Any, root: Json) -> list[Any]:
    """Return the values that a schema lists; an empty list if it lists none."""
    part = follow(part, root)
    if not isinstance(part, dict):
        return []
    return [True, False] if part.get("type") == "boolean" else part.get("enum", [])
