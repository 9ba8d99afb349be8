"""Translate JSON schemas of real use to the keywords of draft 2020-12: older drafts, OpenAPI, wrappers, vendor words.

A translation allows no value that the schema forbids. Words that say nothing about values are dropped and listed; words
that look like a misspelt keyword are refused. What is left is checked against the table in `keywords.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ovis_model.grammar import keywords

Json = dict[str, Any]

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = ("items", "additionalProperties")
_GROUPS = {*_MAPS, *_LISTS}
_APPLICATORS = {"allOf", "anyOf", "oneOf", "$ref", "if", "$dynamicRef"}
_TYPE_OF = {
    **dict.fromkeys(("properties", "patternProperties", "additionalProperties"), "object"),
    **dict.fromkeys(("minProperties", "maxProperties"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems"), "array"),
    **dict.fromkeys(("pattern", "minLength", "maxLength"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"),
}
_MEANINGFUL = set(keywords.SUPPORTED["properties"]) - set(keywords.IGNORED) | keywords.REFUSED | keywords.TRANSLATED


@dataclass(frozen=True)
class Translation:
    """A schema of draft 2020-12 and the words of the original that were dropped, e.g. "x-order", "format 'iban'"."""

    schema: Any
    dropped: tuple[str, ...]


def translate_schema(given: Any) -> Translation:
    """Return the translation. Raise ValueError with the place and the word that is probably misspelt."""
    root = _unwrap(given)
    if not isinstance(root, dict):
        return Translation(root, ())
    translator = _Translator(root)
    schema = translator.translate(root, "#")
    translator.translate_targets(schema)
    return Translation(schema, tuple(translator.dropped))


def resolve_pointer(reference: Any, root: Any) -> Any:
    """Return what "#/$defs/name" names in `root`; None for anything else."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for name in filter(None, reference.removeprefix("#").split("/")):
        found = found.get(_unescape(name)) if isinstance(found, Mapping) else _get_item(found, name)
    return found


def _unwrap(given: Any) -> Any:
    """Return the schema in what OpenAI's API takes: {name, strict, schema}, or that as the value of `json_schema`."""
    if isinstance(given, dict) and given.get("type") == "json_schema" and isinstance(given.get("json_schema"), dict):
        given = given["json_schema"]
    is_wrapper = isinstance(given, dict) and isinstance(given.get("schema"), dict) and "name" in given
    return given["schema"] if is_wrapper and given.keys() <= {"name", "strict", "schema", "description"} else given


def _get_item(found: Any, name: str) -> Any:
    return found[int(name)] if isinstance(found, list) and name.isdecimal() and int(name) < len(found) else None


def _unescape(name: str) -> str:
    return name.replace("~1", "/").replace("~0", "~")


@dataclass
class _Translator:
    """The translation of one schema. `targets`: the references that lead outside of schemas, and their new names."""

    root: Json
    dropped: dict[str, None] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)

    def translate(self, part: Any, place: str, *, is_branch: bool = False) -> Any:
        """Return one schema with all that it contains; `is_branch`: one of several that apply to the same value."""
        if not isinstance(part, dict):
            return part
        if part.get("not") in ({}, True):
            return False
        known = {name: value for name, value in part.items() if self._is_known(name, place)}
        if _is_harmless_id(known):
            del known["$id"]
        for step in _STEPS:
            step(known, self.root)
        self._translate_reference(known)
        self._check_discriminator(known, place)
        _infer_type(known, is_branch=is_branch)
        self._translate_format(known)
        _translate_decimal(known)
        known = {name: copy_group(value) if name in _GROUPS else value for name, value in known.items()}
        for name, key, inner_place in list(list_inner(known, place)):
            holder, at = (known, name) if key is None else (known[name], key)
            holder[at] = self.translate(holder[at], inner_place, is_branch=name in ("allOf", "anyOf", "oneOf"))
        return _translate_nullable(known)

    def translate_targets(self, schema: Json) -> None:
        """Add what is referenced outside of schemas, e.g. at #/components/schemas/name, to the schema's `$defs`."""
        done: set[str] = set()
        while missing := [reference for reference in self.targets if reference not in done]:
            for reference in missing:
                target = resolve_pointer(reference, self.root)
                schema.setdefault("$defs", {})[self.targets[reference]] = self.translate(target, reference)
                done.add(reference)

    def _is_known(self, name: str, place: str) -> bool:
        """Return whether a word has a meaning. Raise ValueError if it is almost one that has."""
        if place == "#" and name in keywords.IGNORED_AT_ROOT:
            return False
        if name in _MEANINGFUL or name in keywords.IGNORED:
            return True
        if name not in keywords.HARMLESS and (meant := _find_keyword(name)):
            raise ValueError(f"{place}: the keyword {name!r} is not supported; did you mean {meant!r}?")
        self.dropped[name] = None
        return False

    def _translate_reference(self, part: Json) -> None:
        reference = part.get("$ref")
        if not isinstance(reference, str):
            return
        own = self.root.get("$id", self.root.get("id"))
        if isinstance(own, str) and own.rstrip("#") and reference.startswith(own.rstrip("#") + "#"):
            reference = reference[len(own.rstrip("#")) :]
        if (anchor := self._find_anchor(reference)) is not None:
            reference = anchor
        exists = reference not in ("#", "#/") and resolve_pointer(reference, self.root) is not None
        if exists and not _leads_to_schema(reference):
            name = self.targets.setdefault(reference, reference.removeprefix("#/").replace("/", "."))
            reference = "#/$defs/" + name.replace("~", "~0")
        part["$ref"] = reference

    def _find_anchor(self, reference: str) -> str | None:
        """Return the path of `#name`, if a definition has this anchor."""
        if not re.fullmatch(r"#[A-Za-z_][\w.-]*", reference):
            return None
        for group in ("$defs", "definitions"):
            for name, part in (self.root.get(group) or {}).items():
                words = {part.get("$anchor"), part.get("$id"), part.get("id")} if isinstance(part, dict) else set()
                if reference in words or reference[1:] in words:
                    return f"#/{group}/{name.replace('~', '~0').replace('/', '~1')}"
        return None

    def _check_discriminator(self, part: Json, place: str) -> None:
        """Raise ValueError if a part of a union does not say which value of the discriminator belongs to it."""
        discriminator = part.get("discriminator")
        name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        branches = part.get("oneOf", part.get("anyOf"))
        if not isinstance(name, str) or not isinstance(branches, list):
            return
        for branch in branches:
            properties = _find_properties(branch, self.root)
            tag = properties.get(name)
            if properties and not (isinstance(tag, dict) and tag.keys() & {"const", "enum"}):
                raise ValueError(
                    f"{place}: the keyword 'discriminator' is not supported for parts whose property {name!r} has "
                    "neither 'const' nor 'enum'; add its value to each part"
                )

    def _translate_format(self, part: Json) -> None:
        """Replace a format by one that is supported and as strict, or drop it: JSON Schema only notes formats."""
        given = part.get("format")
        if not isinstance(given, str):
            return
        types = part.get("type", "string")
        if "string" not in ([types] if isinstance(types, str) else types or ()):
            del part["format"]
            if given == "int32" and types == "integer":
                part["minimum"] = max(-(2**31), part.get("minimum", -(2**31)))
                part["maximum"] = min(2**31 - 1, part.get("maximum", 2**31 - 1))
            return
        part["format"] = keywords.STRICTER_FORMATS.get(given, given)
        if part["format"] not in keywords.FORMATS:
            del part["format"]
            self.dropped[f"format {given!r}"] = None
        elif "enum" in part or "const" in part:
            del part["format"]


def list_inner(part: Json, place: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (keyword, key in its value or None, place) of all schemas in a schema."""
    for name in _SINGLES:
        if isinstance(part.get(name), dict):
            yield name, None, f"{place}/{name}"
    for name in _MAPS:
        if isinstance(part.get(name), dict):
            yield from ((name, key, f"{place}/{name}/{_escape(key)}") for key in part[name])
    for name in _LISTS:
        if isinstance(part.get(name), list):
            yield from ((name, number, f"{place}/{name}/{number}") for number in range(len(part[name])))


def _is_harmless_id(part: Json) -> bool:
    """Return whether a schema's `$id` changes no reference: it only names a place, or nothing refers from there."""
    own = part.get("$id")
    return isinstance(own, str) and (own.startswith("#") or '"$ref"' not in json.dumps(part))


def copy_group(value: Any) -> Any:
    """Return a copy of what holds several schemas: the original is only read."""
    return value.copy() if isinstance(value, dict | list) else value


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _find_keyword(name: str) -> str | None:
    """Return the keyword that a word is probably meant to be."""
    if name in keywords.MEANT:
        return keywords.MEANT[name]
    if name.startswith(("x-", "X-", "$", "_")):
        return None
    lower = {keyword.lower().replace("_", ""): keyword for keyword in _MEANINGFUL}
    word = name.lower().replace("_", "").replace("-", "")
    found = get_close_matches(word, list(lower), 1, cutoff=0.86)
    return lower[found[0]] if found and abs(len(found[0]) - len(word)) <= 1 else None


def _leads_to_schema(reference: str) -> bool:
    """Return whether a reference stays within keywords that are kept."""
    first = reference.removeprefix("#/").split("/")[0]
    return _unescape(first) in {*_MAPS, *_LISTS, *_SINGLES}


def _find_properties(part: Any, root: Json) -> Mapping[str, Any]:
    for _ in range(64):
        if isinstance(part, dict) and "$ref" in part:
            part = resolve_pointer(part["$ref"], root)
    found = part.get("properties") if isinstance(part, dict) else None
    return found if isinstance(found, dict) else {}


def _translate_bounds(part: Json, root: Json) -> None:
    """Replace exclusive bounds of draft 4, which are booleans."""
    for name, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(part.get(exclusive), bool):
            is_exclusive = part.pop(exclusive)
            if is_exclusive and name in part:
                part[exclusive] = part.pop(name)


def _translate_items(part: Json, root: Json) -> None:
    """Replace tuples of draft 7, which are lists in `items`."""
    rest = part.pop("additionalItems", True)
    if isinstance(part.get("items"), list):
        part["prefixItems"] = part.pop("items")
        if not part["prefixItems"]:
            del part["prefixItems"]
        if rest is not True:
            part["items"] = rest


def _translate_any(part: Json, root: Json) -> None:
    """Drop the type "any" of draft 3, and `required: false` at a property."""
    types = part.get("type")
    if types == "any" or (isinstance(types, list) and "any" in types):
        del part["type"]
    if part.get("required") is False:
        del part["required"]


def _translate_unevaluated(part: Json, root: Json) -> None:
    """Replace `unevaluated...`, which equals `additional...` where nothing else applies to the same value."""
    for name, other in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if name in part and (part[name] is True or not part.keys() & _APPLICATORS):
            value = part.pop(name)
            if value is not True:
                part.setdefault(other, value)


def _translate_lone_words(part: Json, root: Json) -> None:
    """Drop keywords that say nothing without others: `then` without `if`, `minContains` without `contains`."""
    if "if" not in part or not part.keys() & {"then", "else"}:
        for name in ("if", "then", "else"):
            part.pop(name, None)
    if "contains" not in part:
        for name in ("minContains", "maxContains"):
            part.pop(name, None)


def _translate_names(part: Json, root: Json) -> None:
    """Replace `propertyNames` of an object whose names are not listed."""
    names = part.get("propertyNames")
    if isinstance(names, dict) and "$ref" in names:
        names = resolve_pointer(names["$ref"], root)
    if names is True or (isinstance(names, dict) and not names.keys() - {"type", "title", "description"}):
        del part["propertyNames"]
        return
    if not isinstance(names, dict) or part.keys() & {"properties", "patternProperties"}:
        return
    words = names.keys() - {"type", "title", "description"}
    values = part.get("additionalProperties", True)
    if words == {"enum"} and all(isinstance(name, str) for name in names["enum"]):
        part["properties"] = dict.fromkeys(names["enum"], values)
    elif words == {"pattern"}:
        part["patternProperties"] = {names["pattern"]: values}
    elif words <= {"minLength", "maxLength"}:
        lengths = f"{names.get('minLength', 0)},{names.get('maxLength', '')}"
        part["patternProperties"] = {f"^.{{{lengths}}}$": values}
    else:
        return
    part["additionalProperties"] = False
    del part["propertyNames"]


def _translate_dependencies(part: Json, root: Json) -> None:
    """Replace "if this property, then ..." by "either not this property, or ..."."""
    found = {}
    for name in ("dependencies", "dependentRequired", "dependentSchemas"):
        if isinstance(part.get(name), dict):
            found.update({(name, key): value for key, value in part.pop(name).items()})
    for (_, key), value in found.items():
        then = {"required": [key, *value]} if isinstance(value, list) else value
        part["allOf"] = [*part.get("allOf", ()), {"anyOf": [_forbid(key), then]}]


def _translate_not(part: Json, root: Json) -> None:
    """Replace "not with these properties" by "without one of them"."""
    words = part.get("not")
    if not isinstance(words, dict):
        return
    if words.keys() == {"anyOf"} and (groups := [_list_required(each) for each in words["anyOf"]]) and all(groups):
        part["allOf"] = [*part.get("allOf", ()), *map(_lack_one, groups)]
        del part["not"]
    elif (groups := [_list_required(each) for each in words.get("allOf", [words])]) and all(groups):
        part["allOf"] = [*part.get("allOf", ()), _lack_one([name for names in groups for name in names])]
        del part["not"]


def _list_required(part: Any) -> list[str]:
    """Return the names of a schema that only says `required`; an empty list for any other one."""
    return part["required"] if isinstance(part, dict) and part.keys() == {"required"} else []


def _lack_one(names: Sequence[str]) -> Json:
    return {"anyOf": [_forbid(name) for name in dict.fromkeys(names)]}


def _forbid(name: str) -> Json:
    return {"type": "object", "properties": {name: False}}


_STEPS = (
    *(_translate_bounds, _translate_items, _translate_any, _translate_unevaluated, _translate_names),
    *(_translate_dependencies, _translate_not, _translate_lone_words),
)


def _infer_type(part: Json, *, is_branch: bool) -> None:
    """Add the type that a schema's keywords are about: one with `properties` means an object."""
    if "properties" in part and not part.keys() & {"type", "enum", "const", "$ref"}:
        part["type"] = "object"
    if part.keys() & {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}:
        return
    kinds = {_TYPE_OF[name] for name in part if name in _TYPE_OF}
    if len(kinds) == 1 and not is_branch:
        [part["type"]] = kinds


def _translate_decimal(part: Json) -> None:
    """Replace pydantic's pattern of a Decimal, which looks ahead."""
    pattern = part.get("pattern")
    if part.get("type") == "string" and isinstance(pattern, str) and pattern.startswith(keywords.PYDANTIC_DECIMAL):
        digits = re.search(r"\\d\{0,(\d+)\}", pattern)
        places = re.search(r"\\\.\\d\{0,(\d+)\}", pattern)
        part["pattern"] = keywords.make_decimal_pattern(
            int(digits[1]) if digits else keywords.DECIMAL_DIGITS,
            int(places[1]) if places else keywords.DECIMAL_PLACES,
        )


def _translate_nullable(part: Json) -> Json:
    """Replace OpenAPI's `nullable`: null is another value. A list of values stays complete, as OpenAPI says."""
    is_nullable = part.pop("nullable", False) is True
    types = part.get("type")
    if not is_nullable or types == "null" or (isinstance(types, list) and "null" in types):
        return part
    if types is not None:
        return {**part, "type": [*([types] if isinstance(types, str) else types), "null"]}
    groups: Json = {name: part.pop(name) for name in ("$defs", "definitions") if name in part}
    return {**groups, "anyOf": [part, {"type": "null"}]} if part.keys() & _APPLICATORS else {**groups, **part}
