"""Check JSON schemas, rewrite them for the grammar library, and validate answers against them.

Every answer is valid by the schema as it was given, though not every valid answer can be given. The rewrites mend what
llguidance 1.9.1 honours only almost; it refuses the combinations of keywords that it cannot compile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.validators import extend
from referencing.jsonschema import DRAFT202012

from ovis_model.grammar import keywords
from ovis_model.grammar.keywords import MAX_SAFE_INTEGER
from ovis_model.grammar.regex import check_pattern

Json = dict[str, Any]

MAX_SCHEMA_CHARS = 1 << 17
MAX_DEPTH = 64  # of objects and lists within each other


def parse_schema(text: str) -> Json:
    """Return the schema. Raise ValueError with the place and the keyword that is not supported."""
    if len(text) > MAX_SCHEMA_CHARS:
        raise ValueError(f"a schema of {len(text)} characters is over the limit of {MAX_SCHEMA_CHARS}")
    try:
        schema = json.loads(text, parse_float=_parse_float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema is not JSON: {error}") from None
    if _is_deeper(schema, MAX_DEPTH):
        raise ValueError(f"a schema more than {MAX_DEPTH} names deep is not supported")
    if isinstance(schema, dict):
        schema = {name: value for name, value in schema.items() if name not in keywords.IGNORED_AT_ROOT}
    if fault := next(_TABLE.iter_errors(schema), None):
        raise ValueError(_describe(fault))
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is an object; this is {schema}")
    return schema


def adapt_schema(schema: Json) -> Json:
    """Return the schema for llguidance to compile."""
    adapted = deepcopy(schema)
    for part in list(walk_schemas(adapted)):
        _rewrite(part, schema)
    return adapted


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


def resolve_reference(reference: Any, root: Any) -> Any:
    """Return what "#/$defs/name" names in the schema `root`; None for anything else."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for name in filter(None, reference.removeprefix("#").split("/")):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


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
    if "anyOf" not in part and _have_tag(part.get("oneOf", ()), root):
        part["anyOf"] = part.pop("oneOf")  # equal, as no value matches two; llguidance follows no `$ref` to see that
    if pattern := keywords.EXACT_FORMATS.get(part.get("format", "")):
        del part["format"]
        part["allOf"] = [*part.get("allOf", ()), {"pattern": pattern}]
    types = part.get("type", ())
    _bound(part, [types] if isinstance(types, str) else types)


def _bound(part: Json, types: Sequence[str]) -> None:
    """Replace bounds beyond 64 bits, on which llguidance fails, and exclusive ones, to which a reader may round."""
    if "integer" in types and "number" not in types:
        part.update({"minimum": -MAX_SAFE_INTEGER, "maximum": MAX_SAFE_INTEGER, **part})
    for inclusive, exclusive, sign, tighter in _BOUNDS:
        for name in part.keys() & {inclusive, exclusive}:
            part[name] = tighter(part[name], -sign * MAX_SAFE_INTEGER)
        if types != ["integer"] and exclusive in part:
            inside = _next_to(part.pop(exclusive), sign)
            part[inclusive] = tighter(inside, part.get(inclusive, inside))


_BOUNDS: Any = (("minimum", "exclusiveMinimum", 1, max), ("maximum", "exclusiveMaximum", -1, min))


def _next_to(bound: float, sign: int) -> float:
    """Return the next number of fewer digits than readers keep."""
    return float(f"{bound + sign * max(abs(bound), 1e-3) * 1e-12:.{keywords.MAX_DIGITS}g}")


def _have_tag(parts: Sequence[Any], root: Json) -> bool:
    """Return whether a property that all parts require has other constants in each."""
    tags = [_constants(part, root) for part in parts]
    shared = set(tags[0]).intersection(*tags[1:]) if tags else ()
    values = [[value for tag in tags for value in tag[name]] for name in shared]
    return any(len(each) == len(set(each)) for each in values)


def _constants(part: Any, root: Json) -> dict[str, set[str]]:
    """Return {name: JSON of its possible values} for the required properties of an object that list their values."""
    for _ in range(MAX_DEPTH):  # a reference to itself ends nowhere
        if isinstance(part, dict) and "$ref" in part:
            part = resolve_reference(part["$ref"], root)
    if not isinstance(part, dict) or part.get("type") != "object":
        return {}
    listed = {name: each for name, each in part.get("properties", {}).items() if isinstance(each, dict)}
    return {
        name: {json.dumps(value, sort_keys=True) for value in listed[name].get("enum", [listed[name].get("const")])}
        for name in part.get("required", ())
        if listed.get(name, {}).keys() & {"enum", "const"}
    }
