"""Spell out what a schema leaves open, so that the bounds of numbers hold there too.

`{}`, `true` and lists without `items` allow any JSON value. The grammar library would write its numbers with any count
of digits and any exponent, which readers round or cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import count
from typing import Any

from ovis_model.grammar import keywords
from ovis_model.grammar.dialects import copy_group, list_inner

Json = dict[str, Any]

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_GROUPS = {"$ref", "anyOf", "oneOf", "allOf"}
_NOT_MERGED = {*keywords.IGNORED, "$defs", "definitions"}
_MAX_DEPTH = 3  # of bounded values within open ones, where a definition cannot refer to itself


def spell_out(schema: Json, parts: Iterable[Json]) -> Json:
    """Return the schema with types, items and additional properties wherever it leaves them open.

    `parts`: all schemas in it. The library merges schemas that apply to one value. It cannot merge definitions that
    refer to themselves, so where it merges, numbers in open values are bounded to a depth of three.
    """
    if any(map(_is_merged, parts)):
        return _fill(schema, _nest_open_value(_MAX_DEPTH))
    groups = schema.get("$defs", {})
    name = next(name for number in count() if (name := f"any{number or ''}") not in groups)
    inner = {"$ref": f"#/$defs/{name}"}
    whole = _fill(schema, inner)
    return {**whole, "$defs": {**whole.get("$defs", {}), name: _fill({}, inner)}}


def _is_merged(part: Json) -> bool:
    groups, others = part.keys() & _GROUPS, part.keys() - _GROUPS - _NOT_MERGED
    are_named_twice = part.keys() >= {"properties", "patternProperties"}
    return are_named_twice or len(groups) > 1 or bool(groups and others) or len(part.get("allOf", ())) > 1


def _nest_open_value(depth: int) -> Json:
    inner = _nest_open_value(depth - 1) if depth else None
    return {"type": [*_TYPES], **({"items": inner, "additionalProperties": inner} if inner else {})}


def _fill(given: Any, inner: Json) -> Json:
    """Return a schema, which is not false, in which `inner` stands for the values of open lists and objects."""
    part: Json = {} if given is True else {name: copy_group(value) for name, value in given.items()}
    if not part.keys() & {"type", "enum", "const", *_GROUPS}:
        part["type"] = [*_TYPES]
    for name, key, _ in list(list_inner(part, "")):
        holder, at = (part, name) if key is None else (part[name], key)
        if holder[at] is not False:
            holder[at] = _fill(holder[at], inner)
    for kind, name in (("array", "items"), ("object", "additionalProperties")):
        if kind in part.get("type", "") and part.get(name, True) is True:
            part[name] = deepcopy(inner)
    return part
