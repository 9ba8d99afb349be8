"""Schemas and patterns that constrain answers: one per kind of the JSON Schema test suite, and real records."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def record(**properties: Json) -> Json:
    """Return the schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


WORD: Json = {"type": "string", "minLength": 1, "maxLength": 12}
POSITION: Json = {"type": "array", "prefixItems": [{"type": "number", "minimum": -180, "maximum": 180}] * 2}
POINT = {**POSITION, "items": False, "minItems": 2}

SCHEMAS: dict[str, Json] = {
    "string": WORD,
    "string of any length": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "several types": {"type": ["integer", "null", "boolean"]},
    "enum of several types": {"enum": ["red", 3, 2.5, None, {"a": [1]}, 'a "quoted"\nline']},
    "const": {"const": {"version": 1, "tags": ["ä", "😀"]}},
    "required and optional": {**record(a=WORD, b={"type": "integer"}, c={"type": "null"}), "required": ["b"]},
    "properties only": {"properties": {"a": {"type": "integer"}}, "type": "object"},
    "additional properties of a type": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,4}_at$": {"type": "integer"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "at least one property": {**record(a=WORD, b=WORD), "required": [], "minProperties": 1},
    "nested objects": record(a=record(b=record(c={"type": "boolean"}))),
    "array with bounds": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [WORD, {"type": "integer"}], "items": False, "minItems": 1},
    "tuple and rest": {"type": "array", "prefixItems": [WORD], "items": {"type": "integer"}, "maxItems": 4},
    "integer with bounds": {"type": "integer", "minimum": -12, "maximum": 120},
    "integer with exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "number with bounds": {"type": "number", "minimum": -0.5, "maximum": 1.25},
    "number with exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "integer with bounds of 64 bits": {"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**63},
    "multiples": {"type": "integer", "multipleOf": 15, "minimum": 0},
    "string lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "pattern and lengths": {"type": "string", "pattern": r"^\S+(?: \S+)*$", "minLength": 3, "maxLength": 9},
    "pattern somewhere": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 8},
    "dates": record(
        on={"type": "string", "format": "date"},
        at={"type": "string", "format": "date-time"},
        time={"type": "string", "format": "time"},
    ),
    "addresses": record(id={"type": "string", "format": "uuid"}, host={"type": "string", "format": "ipv4"}),
    "any of": {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string", "maxLength": 2}, {"type": "null"}]},
    "any of with properties": {
        **record(a={"type": "integer"}),
        "anyOf": [{"properties": {"a": {"minimum": 5}}}, {"properties": {"a": {"maximum": -5}}}],
    },
    "one of, distinguished by a tag": {
        "oneOf": [record(kind={"const": "circle"}, radius={"type": "integer"}), record(kind={"const": "dot"})]
    },
    "one of references, distinguished by a tag": {  # as pydantic writes a union with a discriminator
        "oneOf": [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Box"}, {"$ref": "#/$defs/Other"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            "Circle": record(kind={"const": "circle"}, radius={"type": "integer"}),
            "Box": record(kind={"enum": ["square", "box"]}, side={"type": "integer"}),
            "Other": {"$ref": "#/$defs/Dot"},
            "Dot": record(kind={"const": "dot"}),
        },
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 0}, {"maximum": 9}]},
    "references": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "array",
        "items": {"$ref": "#/$defs/pair"},
        "minItems": 1,
        "maxItems": 3,
        "$defs": {
            "pair": record(x={"type": "integer", "maximum": 99}, y={"$ref": "#/$defs/flag"}),
            "flag": {"enum": [0]},
        },
    },
    "reference with a bound": {"$ref": "#/$defs/n", "maximum": 5, "$defs": {"n": {"type": "integer"}}},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                **record(value={"type": "boolean"}, children={"type": "array", "items": {"$ref": "#/$defs/node"}}),
                "required": ["value"],
            }
        },
    },
    "bounds of any type": {"minimum": 5, "maxLength": 3, "type": ["number", "string"]},
    "invoice": record(
        vendor={**WORD, "title": "Name of the seller"},
        date={"type": "string", "format": "date"},
        currency={"enum": ["EUR", "USD", "GBP"]},
        total={"type": "number", "minimum": 0, "maximum": 1e6},
        lines={
            "type": "array",
            "maxItems": 3,
            "items": record(
                name=WORD,
                count={"type": "integer", "minimum": 1, "maximum": 99},
                price={"type": "number", "minimum": 0, "maximum": 99.5},
            ),
        },
    ),
    "product listing": record(
        title=WORD,
        category={"enum": ["clothing", "furniture", "toys"]},
        colours={"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        price={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9999}, {"type": "null"}], "default": None},
        is_new={"type": "boolean"},
    ),
    "bounding boxes": {
        "type": "array",
        "maxItems": 3,
        "items": record(
            label=WORD,
            box={
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 1000},
                "minItems": 4,
                "maxItems": 4,
            },
        ),
    },
    "geographic point": record(type={"const": "Point"}, coordinates=POINT),
    "text recognition": record(
        language={"type": "string", "pattern": "^[a-z]{2}$"},
        lines={"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 10}, "maxItems": 3},
        confidence={"type": "number", "minimum": 0, "maximum": 1},
    ),
}

PATTERNS = (
    "[A-Z]{2}[0-9]{4}",
    "(?:yes|no|maybe)",
    r"^\d{1,3}(?:\.\d)?$",
    r"\w+@\w+\.(?:com|org)",
    "[äöü]{2}|[^a-z]{3}",
    r"a/b\\c\t\"\x41\u0042",
    r"(?P<year>[12]\d{3})-(?P<month>0[1-9]|1[0-2])",
    r"\S{2,5}\s?\S{2,5}",
    "",
)
