"""Close the objects of a schema: a model may only answer the properties that are named.

JSON Schema would allow any other property. A model would invent some, and no column could hold them.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from referencing.jsonschema import DRAFT202012

from ovis_model.grammar.json_schema import walk_schemas

Json = Any

_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "$ref"}
_GROUPS = ("allOf", "anyOf", "oneOf")


def close_objects(schema: Json) -> Json:
    """Return a translated schema whose objects allow only `properties`, unless it has keywords about others.

    An object stays open if parts of it (`anyOf`, `oneOf`) name other properties: each would forbid those of the others.
    With such an `allOf` the whole schema stays open, because a part may refer to any object.
    """
    closed = deepcopy(schema)
    if all("allOf" not in part or ("properties" in part and _names_all(part)) for part in walk_schemas(closed)):
        _close(closed)
    return closed


def _close(schema: Json) -> None:
    if not isinstance(schema, dict):
        return
    types = schema.get("type", "")
    is_object = "properties" in schema and "object" in ([types] if isinstance(types, str) else types)
    if is_object and not _names_all(schema):
        return
    for part in DRAFT202012.subresources_of(schema):
        if not (is_object and any(part is branch for name in _GROUPS for branch in schema.get(name, ()))):
            _close(part)
    if is_object and not schema.keys() & _OPEN:
        schema["additionalProperties"] = False
        for name in schema.get("required", ()):
            schema["properties"].setdefault(name, {})


def _names_all(schema: Json) -> bool:
    """Return whether all properties in the parts of an object are among its own."""
    parts = [part for name in _GROUPS for part in schema.get(name, ())]
    return all(_list_names(part) <= schema["properties"].keys() for part in parts)


def _list_names(part: Any) -> set[str | None]:
    """Return the properties that a part of an object names; None stands for those that cannot be listed."""
    if not isinstance(part, dict):
        return set()
    found: set[str | None] = {*part.get("properties", ()), *part.get("required", ())}
    found |= {None} if part.keys() & _OPEN - {"additionalProperties"} else set()
    return found.union(*(_list_names(inner) for name in _GROUPS for inner in part.get(name, ())))
