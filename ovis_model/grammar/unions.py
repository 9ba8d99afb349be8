"""Rewrite `oneOf` as `anyOf` whose parts no value can match twice.

Two parts exclude each other if they allow other types or other values, if a property has other constants in each, or if
one forbids a name that the other requires. Where that is so for all pairs, the parts are narrowed until it shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ovis_model.grammar.dialects import resolve_pointer

Json = dict[str, Any]

_MAX_DEPTH = 64
_TYPES = frozenset(("array", "boolean", "null", "number", "object", "string"))
_TYPE_OF = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}


@dataclass(frozen=True)
class _Part:
    """What can tell one part of a union from others. `values` is None if the part does not list them."""

    types: frozenset[str]
    values: frozenset[str] | None
    constants: Mapping[str, frozenset[str]]
    names: frozenset[str]
    required: frozenset[str]
    is_closed: bool


def separate_parts(parts: Sequence[Any], root: Json, types: Any = None) -> list[Any] | None:
    """Return the parts, narrowed so that no value matches two of them; None if that cannot be done.

    `types`: the value of `type` next to the union, if it has one.
    """
    around = _TYPES if types is None else _to_types([types] if isinstance(types, str) else types)
    described = [replace(own, types=own.types & around) for own in (_describe(part, root) for part in parts)]
    tag = _find_tag(described)
    narrowed = []
    for part, own in zip(parts, described, strict=True):
        required: set[str] = {tag} if tag and own.types == {"object"} else set()
        forbidden: set[str] = set()
        for other in described:
            if other is own or _exclude(own, other):
                continue
            are_objects = own.types == other.types == {"object"}
            if are_objects and tag:
                continue
            only_other = other.required - own.required
            if not only_other or not are_objects:
                return None
            forbidden |= only_other
        narrowed.append(_narrow(part, required, forbidden, own))
    return narrowed


def follow(part: Any, root: Json) -> Any:
    """Return what a chain of references leads to; a reference that leads to itself is returned as it is."""
    for _ in range(_MAX_DEPTH):
        if isinstance(part, dict) and "$ref" in part:
            part = resolve_pointer(part["$ref"], root)
    return part


def _describe(part: Any, root: Json) -> _Part:
    part = follow(part, root)
    part = part if isinstance(part, dict) else {}
    values = part.get("enum", [part["const"]] if "const" in part else None)
    properties = {name: follow(each, root) for name, each in (part.get("properties") or {}).items()}
    types = part.get("type", _TYPES)
    listed = [types] if isinstance(types, str) else types
    kinds = listed if values is None else [_TYPE_OF.get(type(value), "other") for value in values]
    return _Part(
        types=_to_types(kinds),
        values=None if values is None else _to_texts(values),
        constants={
            name: _to_texts(each.get("enum", [each.get("const")]))
            for name, each in properties.items()
            if isinstance(each, dict) and each.keys() & {"enum", "const"}
        },
        names=frozenset(properties),
        required=frozenset(part.get("required", ())),
        is_closed=part.get("additionalProperties") is False and "patternProperties" not in part,
    )


def _to_types(kinds: Iterable[str]) -> frozenset[str]:
    return frozenset("number" if kind == "integer" else kind for kind in kinds)


def _to_texts(values: Sequence[Any]) -> frozenset[str]:
    return frozenset(json.dumps(value, sort_keys=True) for value in values)


def _find_tag(parts: Sequence[_Part]) -> str:
    """Return a property whose constants differ in all parts that are objects; "" if there is none."""
    objects = [part for part in parts if part.types == {"object"}]
    for name in sorted(set(objects[0].constants).intersection(*(o.constants for o in objects[1:])) if objects else ()):
        values = [value for part in objects for value in part.constants[name]]
        if len(objects) > 1 and len(values) == len(set(values)):
            return name
    return ""


def _exclude(one: _Part, other: _Part) -> bool:
    """Return whether no value matches both parts as they are."""
    if not one.types & other.types:
        return True
    if one.values is not None and other.values is not None and not one.values & other.values:
        return True
    if not one.types & other.types <= {"object"}:
        return False
    shared = one.required & other.required & one.constants.keys() & other.constants.keys()
    if any(not one.constants[name] & other.constants[name] for name in shared):
        return True
    return bool((other.is_closed and one.required - other.names) or (one.is_closed and other.required - one.names))


def _narrow(part: Any, required: set[str], forbidden: set[str], own: _Part) -> Any:
    """Return the part with more names that it requires or forbids."""
    if not required - own.required and not forbidden:
        return part
    base = part if isinstance(part, dict) else {}
    properties = {**base.get("properties", {}), **dict.fromkeys(sorted(forbidden), False)}
    narrowed = {**base, "required": [*base.get("required", ()), *sorted(required - own.required)]}
    return {**narrowed, "properties": properties} if properties else narrowed
