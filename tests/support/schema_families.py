"""Schemas of the kinds that people have: Kubernetes, OpenAPI, repositories, pydantic models, OpenAI's wrappers.

`list_families` returns {kind: schemas}, made by combining the words that each kind is known for. They are our own.
"""

from __future__ import annotations

import datetime
import decimal
import enum
from itertools import product
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field, TypeAdapter

Json = dict[str, Any]
TEXT: Json = {"type": "string", "maxLength": 20}


def list_families() -> dict[str, list[Json]]:
    """Return at least 200 schemas by kind."""
    return {
        "Kubernetes": [*_list_kubernetes()],
        "OpenAPI": [*_list_openapi()],
        "repositories": [*_list_repositories()],
        "pydantic": [*_list_pydantic()],
        "OpenAI": [*_list_openai()],
        "older drafts": [*_list_drafts()],
        "not supported": [*_list_unsupported()],
    }


def make_object(properties: Json, *required: str, **words: Any) -> Json:
    return {"type": "object", "properties": properties, "required": list(required), **words}


def _list_kubernetes() -> Any:
    names = ("replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds", "port")
    for kind, field, group in product(("Deployment", "Service", "ConfigMap", "CronJob"), names, ("apps", "batch")):
        yield {
            "description": f"{kind} enables declarative updates.",
            "type": "object",
            "properties": {
                "apiVersion": {"type": "string", "enum": [f"{group}/v1"]},
                "kind": {"type": "string", "enum": [kind]},
                "metadata": {"$ref": "#/definitions/meta"},
                "spec": make_object(
                    {
                        field: {"type": "integer", "format": "int32"},
                        "strategy": {"type": "string", "enum": ["Recreate", "RollingUpdate"]},
                        "maxSurge": {
                            "x-kubernetes-int-or-string": True,
                            "anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}],
                        },
                    },
                    field,
                ),
            },
            "required": ["kind", "spec"],
            "x-kubernetes-group-version-kind": [{"group": group, "kind": kind, "version": "v1"}],
            "definitions": {
                "meta": {
                    "type": "object",
                    "properties": {
                        "name": TEXT,
                        "labels": {"type": "object", "additionalProperties": TEXT, "maxProperties": 2},
                        "creationTimestamp": {"type": "string", "format": "date-time"},
                    },
                    "x-kubernetes-map-type": "atomic",
                }
            },
        }


def _list_openapi() -> Any:
    formats = ("int32", "int64", "float", "double")
    texts = ("date", "date-time", "password", "byte", "binary", "uuid", "hostname", "uri-reference", "phone")
    for number, text in product(formats, texts):
        kind = "integer" if number.startswith("int") else "number"
        yield {
            "type": "object",
            "xml": {"name": "pet"},
            "externalDocs": {"url": "https://example.com"},
            "example": {"id": 1},
            "x-speakeasy-name": "Pet",
            "properties": {
                "id": {"type": kind, "format": number, "example": 10, "minimum": 0, "exclusiveMinimum": True},
                "text": {"type": "string", "format": text, "readOnly": True},
                "note": {"type": "string", "nullable": True, "maxLength": 9},
                "owner": {"$ref": "#/components/schemas/Owner"},
                "status": {"type": "string", "enum": ["available", "sold"], "x-enum-varnames": ["A", "S"]},
            },
            "required": ["id", "status"],
            "components": {"schemas": {"Owner": make_object({"name": TEXT}, "name", externalDocs={})}},
        }
    for style in ("oneOf", "anyOf"):
        parts = [make_object({"petType": {"type": "string", "enum": [name]}, name: TEXT}) for name in ("cat", "dog")]
        yield {style: parts, "discriminator": {"propertyName": "petType", "mapping": {"cat": "#/a"}}}


def _list_repositories() -> Any:
    combined: tuple[Json, ...] = (
        {"oneOf": [{"required": ["run"]}, {"required": ["uses"]}]},
        {"anyOf": [{"required": ["run"]}, {"required": ["uses"]}]},
        {"dependencies": {"with": ["uses"]}},
        {"dependentRequired": {"with": ["uses"]}},
        {"not": {"required": ["run", "uses"]}},
        {"unevaluatedProperties": False},
        {"minProperties": 1},
    )
    vendor = ("x-intellij-html-description", "markdownDescription", "defaultSnippets", "errorMessage", "tsType")
    for words, name in product(combined, vendor):
        step: Json = {name: "a hint", "properties": {"run": TEXT, "uses": TEXT, "with": {"type": "boolean"}}, **words}
        yield {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$id": "https://example.com/workflow.json",
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "maxLength": 9, "pattern": r"^[\w-]*$"},
                "steps": {"type": "array", "items": {"$ref": "#/definitions/step"}, "minItems": 1, "maxItems": 2},
                "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
            },
            "required": ["steps"],
            "definitions": {"step": step},
        }


class Colour(enum.Enum):
    """A colour."""

    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Annotated[int, Field(ge=0, le=9)] = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    good: bool


Money = Annotated[decimal.Decimal, Field(max_digits=8, decimal_places=2)]
Short = Annotated[str, Field(max_length=8)]
FIELD_TYPES: dict[str, Any] = {
    "int": int,
    "float": Annotated[float, Field(gt=0, lt=1)],
    "date": datetime.date,
    "datetime": datetime.datetime,
    "time": datetime.time,
    "uuid": UUID,
    "enum": Colour,
    "optional": Short | None,
    "union": int | Short,
    "tagged": Annotated[Cat | Dog, Field(discriminator="kind")],
    "set": set[Literal["a", "b", "c"]],
    "set of numbers": set[Annotated[int, Field(ge=0, le=99)]],
    "tuple": tuple[int, Short],
    "pair": tuple[float, float],
    "map": dict[Short, int],
    "map of choices": dict[Literal["x", "y"], bool],
    "map of patterns": dict[Annotated[str, Field(pattern="^[a-z]{1,3}$")], int],
    "list": Annotated[list[Short], Field(max_length=2)],
    "model": Cat,
    "bytes": bytes,
    "duration": datetime.timedelta,
}


def _list_pydantic() -> Any:
    for name, kind in FIELD_TYPES.items():
        yield TypeAdapter(kind).json_schema()
        yield TypeAdapter(kind | None).json_schema()
        model: Any = type("Model", (BaseModel,), {"__annotations__": {"value": kind, "label": Short}, "__doc__": name})
        yield model.model_json_schema()
    for digits in (r"\d*\.?\d*$", r"(?:\d{0,6}|(?=[\d.]{1,9}0*$)\d{0,6}\.\d{0,2}0*)$"):
        yield make_object({"price": {"anyOf": [{"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*" + digits}]}})


def _list_openai() -> Any:
    parts: tuple[Json, ...] = (
        {"answer": {"type": ["string", "null"], "maxLength": 9}, "score": {"type": "number"}},
        {"steps": {"type": "array", "items": {"$ref": "#/$defs/step"}, "maxItems": 2}},
        {"next": {"anyOf": [{"$ref": "#/$defs/step"}, {"type": "null"}]}},
        {"kind": {"type": "string", "enum": ["a", "b"]}, "n": {"type": "integer", "minimum": 1, "maximum": 5}},
    )
    step = make_object({"text": TEXT}, "text", additionalProperties=False)
    for properties, is_strict, form in product(parts, (True, False), range(3)):
        schema = make_object(properties, *properties, additionalProperties=False, **{"$defs": {"step": step}})
        wrapper = {"name": "reply", "strict": is_strict, "schema": schema}
        yield (wrapper, {"type": "json_schema", "json_schema": wrapper}, {**wrapper, "description": "A reply."})[form]


def _list_drafts() -> Any:
    for words in (
        {"id": "https://example.com/a", "title": "A"},
        {"self": {"vendor": "com.example", "version": "1-0-0"}},
        {"readonly": True, "example": 5, "deprecated": True, "$comment": "old"},
        {"examples": [1], "contentEncoding": "base64", "$anchor": "top"},
    ):
        yield {**make_object({"a": {"type": "integer"}}, "a"), **words}
        yield {"properties": {"a": {"type": "array", "items": [TEXT, {"type": "integer"}], "minItems": 2}}, **words}
        yield {"properties": {"a": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1}}, **words}
        yield {"items": [{"type": "integer"}], "additionalItems": False, **words}
        yield {"properties": {"a": {"type": "any"}, "b": {"required": False, **TEXT}}, **words}


def _list_unsupported() -> Any:
    yield {"type": "string", "maxLenght": 5}
    yield {"type": "array", "contains": {"type": "integer"}}
    yield {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}
    yield {"type": "string", "pattern": "^(?!admin)"}
    yield {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    yield {"type": "number", "multipleOf": 0.01}
    yield {"$ref": "https://example.com/other.json"}
    yield {"type": "object", "properties": {"a": {"not": {"enum": ["x"]}}}}
