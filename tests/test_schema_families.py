"""Schemas as people have them: nearly all are supported, and no finished answer breaks its schema."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from jsonschema import Draft202012Validator as Validator

from ovis_model.grammar import guides as guides_module
from ovis_model.grammar.dialects import translate_schema
from ovis_model.grammar.guides import allows, check
from ovis_model.grammar.json_schema import drop_repeats, find_ignored, parse_schema
from pipelines.tasks.answer_types import Record, parse_answer
from tests.support.schema_families import FIELD_TYPES, list_families

END = 256
LIKELY = b'"}],: etaoinshrdlu0123456789.-+tfn'
FAMILIES = list_families()


def draw_answer(record: Record, seed: int, max_bytes: int = 1500) -> str | None:
    """Return an answer drawn byte by byte, with short texts; None if it does not end."""
    rng, answer = random.Random(seed), bytearray()
    state = guides_module._start_matcher(record.constraint, guides_module._make_byte_trie())
    while len(answer) < max_bytes:
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little"))
        likely = [byte for byte in allowed if byte == END or byte in LIKELY] if rng.random() < 0.9 else []
        byte = int(rng.choice(likely or list(allowed)))
        for wanted, chance in ((END, 0.7), (ord('"'), 0.3), (ord("]"), 0.2), (ord("}"), 0.2)):
            byte = wanted if wanted in allowed and rng.random() < chance else byte
        if byte == END:
            return answer.decode()
        assert state.consume_token(byte)
        answer.append(byte)
    return None


def test_nearly_all_schemas_are_supported_and_no_answer_breaks_its_schema() -> None:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in FAMILIES}
    for kind, schemas in FAMILIES.items():
        for number, schema in enumerate(schemas):
            record = parse_answer({"json_schema": schema})
            assert isinstance(record, Record)
            try:
                check(record.constraint)
            except ValueError:
                counts[kind]["refused"] += 1
                continue
            counts[kind]["served"] += 1
            counts[kind].update(check_answer(record, schema, seed) for seed in (number,))
    print({kind: dict(count) for kind, count in counts.items()})
    totals = sum(counts.values(), Counter())
    assert sum(map(len, FAMILIES.values())) >= 200
    assert totals["served"] >= 0.9 * sum(map(len, FAMILIES.values()))
    assert totals["truncated"] < 0.05 * totals["valid"]
    assert counts["not supported"]["served"] == 0
    assert not any(count["refused"] for kind, count in counts.items() if kind != "not supported")


def check_answer(record: Record, schema: dict[str, Any], seed: int) -> str:
    """Return "valid" or "truncated"; fail for a finished answer that the schema as written forbids."""
    text = draw_answer(record, seed)
    if text is None:
        return "truncated"
    value = drop_repeats(json.loads(text), record.schema)
    plain = translate_schema(schema).schema if "nullable" in record.schema else unwrap(schema)
    Validator(plain).validate(value)
    pa.array([record.parse(text)], record.type)
    return "valid"


def unwrap(schema: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = schema.get("json_schema", schema)
    inner = inner.get("schema", inner)
    items = inner.get("properties", {}).get("a", {})
    has_old_words = any(isinstance(part.get("items"), list) for part in (inner, items)) or "required" in str(items)
    is_old = has_old_words or "True" in str(items.get("exclusiveMinimum")) or items.get("type") == "any"
    return translate_schema(inner).schema if is_old or "exclusiveMinimum': True" in str(inner) else inner


@pytest.mark.parametrize(
    ("name", "type_", "text", "value"),
    [
        ("date", pa.date32(), '"2024-02-29"', "2024-02-29"),
        ("datetime", pa.timestamp("us", tz="UTC"), '"2024-02-29T01:00:00+01:00"', "2024-02-29 00:00:00+00:00"),
        ("set", pa.list_(pa.string()), '["a","b","a"]', ["a", "b"]),
        ("tuple", pa.struct({"item_0": pa.int64(), "item_1": pa.string()}), '[1,"b"]', {"item_0": 1, "item_1": "b"}),
        ("pair", pa.list_(pa.float64()), "[1,2.5]", [1.0, 2.5]),
        (
            "map",
            pa.list_(pa.struct({"key": pa.string(), "value": pa.int64()})),
            '{"b":1}',
            [{"key": "b", "value": 1}],
        ),
        ("map of choices", pa.struct({"x": pa.bool_(), "y": pa.bool_()}), '{"y":true}', {"x": None, "y": True}),
        ("optional", pa.string(), "null", None),
        ("tagged", pa.string(), '{"kind":"cat","lives":3}', '{"kind": "cat", "lives": 3}'),
    ],
)
def test_types_of_python_have_arrow_types(name: str, type_: pa.DataType, text: str, value: Any) -> None:
    from pydantic import TypeAdapter

    answer = parse_answer({"json_schema": TypeAdapter(FIELD_TYPES[name]).json_schema()})
    assert answer.type == type_
    assert (str if isinstance(value, str) else lambda same: same)(answer.parse(text)) == value
    pa.array([answer.parse(text)], type_)


def test_a_decimal_is_a_decimal() -> None:
    pattern = r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,6}|(?=[\d.]{1,9}0*$)\d{0,6}\.\d{0,2}0*)$"
    answer = parse_answer({"json_schema": {"type": "string", "pattern": pattern}})
    assert answer.type == pa.decimal128(28, 10)
    assert pa.array([answer.parse('"-12.50"')], answer.type).to_pylist()[0] * 2 == -25
    for seed in range(20):
        assert isinstance(answer, Record)
        text = draw_answer(answer, seed)
        assert text is None or Validator({"pattern": pattern}).is_valid(json.loads(text))


def test_properties_without_a_type_mean_an_object_and_names_beyond_them_are_kept() -> None:
    closed = parse_answer({"json_schema": {"properties": {"a": {"type": "integer"}}}})
    assert closed.type == pa.struct({"a": pa.int64()})
    open_ = parse_answer({"json_schema": {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}})
    assert json.loads(open_.parse('{"a": 1, "b": 2}')) == {"a": 1, "b": 2}


def test_properties_next_to_a_union_mean_an_object_too() -> None:
    either = {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    for name in ("anyOf", "oneOf"):
        answer = parse_answer({"json_schema": {**either, name: [{"required": ["a"]}, {"required": ["b"]}]}})
        assert answer.type == pa.struct({"a": pa.int64(), "b": pa.int64()})
        assert isinstance(answer, Record)
        for seed in range(10):
            text = draw_answer(answer, seed)
            assert text is None or len(json.loads(text)) in ((1,) if name == "oneOf" else (1, 2))


def test_names_that_differ_in_case_only_are_no_struct() -> None:
    schema = {"properties": {"a": {"type": "integer"}, "A": {"type": "integer"}}}
    assert parse_answer({"json_schema": schema}).type == pa.string()


@pytest.mark.parametrize("bounds", [{}, {"minimum": 0}, {"exclusiveMinimum": 0, "maximum": 1}, {"maximum": 1e-9}])
def test_numbers_have_few_digits_and_no_exponent(bounds: dict[str, float]) -> None:
    record = parse_answer({"json_schema": {"type": "number", **bounds}})
    assert isinstance(record, Record)
    check(record.constraint)
    for seed in range(10):
        text = draw_answer(record, seed, 60)
        assert text is not None and len(text) <= 32 and "e" not in text.lower()
        Validator({"type": "number", **bounds}).validate(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, "{}"),
        ({}, '[true, {{"a": [{}]}}]'),
        ({"type": ["array", "null"]}, '["", {}]'),
        ({"type": "object"}, '{{"a": {{"b": {}}}}}'),
        ({"properties": {"a": True}}, '{{"a": {}}}'),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": True}, '{{"a": null, "b": {}}}'),
        ({"type": "object", "patternProperties": {"^a$": {"type": "null"}}}, '{{"a": null, "b": {}}}'),
        (
            {"properties": {"a": {}}, "patternProperties": {"^[a-c]$": {"minimum": -9}, "^d$": {}}},
            '{{"b": {}, "d": {{"e": {}}}}}',
        ),
        ({"type": "array", "prefixItems": [{"type": "null"}]}, "[null, {}]"),
        ({"anyOf": [{"minLength": 2, "minItems": 2}, {"type": "null"}]}, "[null, {}]"),
        ({"$defs": {"any": {}}, "properties": {"a": {"$ref": "#/$defs/any"}}}, '{{"a": [{}]}}'),
        ({"allOf": [{"required": ["a"]}, {"properties": {"b": {"type": "object"}}}]}, '{{"b": {{}}, "a": {}}}'),
        ({"allOf": [{"type": "object"}, {"properties": {"a": {}}}]}, '{{"a": {{"b": {{"c": {}}}}}}}'),
    ],
)
def test_numbers_are_bounded_where_a_schema_leaves_them_open(schema: Any, text: str) -> None:
    record = parse_answer({"json_schema": schema})
    assert isinstance(record, Record)
    check(record.constraint)
    for number in ("1", "-2.5", "123456789012", "0.000001"):
        assert allows(record.constraint, text.format(number, number)), number
        record.parse(text.format(number, number))
    for number in ("1e5", "1E-5", "1e400", "-1.5e308", "0.12345678901", "12345678901234567890"):
        assert not allows(record.constraint, text.format(number, number)), number


def test_items_beyond_a_tuple_may_be_of_any_type() -> None:
    answer = parse_answer({"json_schema": {"type": "array", "prefixItems": [{"type": "boolean"}]}})
    assert answer.type == pa.string() and answer.parse("[true, 5]") == "[true, 5]"


@pytest.mark.parametrize(
    "part",
    [
        {"$id": "#/properties/a", "type": "integer"},
        {"$id": "https://example.com/a.json", "type": "integer"},
        {"type": "integer", "then": {"minimum": 5}, "else": False},
        {"type": "integer", "if": {"minimum": 5}, "minContains": 2, "maxContains": 1},
    ],
)
def test_words_that_change_nothing_where_they_stand_are_ignored(part: Any) -> None:
    record = parse_answer({"json_schema": {"type": "object", "properties": {"a": part}}})
    assert isinstance(record, Record)
    check(record.constraint)
    assert record.type == pa.struct({"a": pa.int64()}) and allows(record.constraint, '{"a": 1}')


@pytest.mark.parametrize(
    "part",
    [
        {"$id": "https://example.com/a.json", "properties": {"b": {"$ref": "#/$defs/b"}}},
        {"if": {"minimum": 5}, "then": {"maximum": 9}},
        {"contains": {"type": "integer"}, "minContains": 2},
    ],
)
def test_words_that_change_answers_are_refused(part: Any) -> None:
    record = parse_answer({"json_schema": {"properties": {"a": part}, "$defs": {"b": {"type": "string"}}}})
    with pytest.raises(ValueError, match=r"the keyword '(\$id|if|contains)' is not supported|then|minContains"):
        check(record.constraint)  # type: ignore[arg-type]


def test_words_without_a_meaning_are_listed_once() -> None:
    schema = {"x-a": 1, "self": {}, "properties": {"b": {"x-a": 2, "type": "string", "format": "iban"}}}
    assert find_ignored(json.dumps(schema)) == ("x-a", "self", "format 'iban'")
    assert find_ignored('{"type": "integer", "title": "A", "$schema": "b"}') == ()
    assert parse_schema(json.dumps(schema))["properties"] == {"b": {"type": "string"}}


def test_nullable_allows_null_as_openapi_does() -> None:
    answer = parse_answer({"json_schema": {"type": "object", "properties": {"a": TEXT_OR_NULL}}})
    assert answer.parse('{"a": null}') == {"a": None}
    either = parse_answer({"json_schema": {"allOf": [{"type": "integer"}], "nullable": True}})
    assert (either.type, either.parse("null"), either.parse("5")) == (pa.int64(), None, 5)


TEXT_OR_NULL = {"type": "string", "nullable": True}
