"""Answer types: their columns, the texts they refuse, the Arrow types of JSON schemas, and the flags."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jsonschema
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovis_model.grammar.json_schema import drop_repeats, validate_answer
from pipelines.tasks.answer_types import find_flags, is_repetitive, parse_answer
from pipelines.tasks.arrow_types import close_objects, infer_shape

INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string"},
        "total": {"type": ["number", "null"]},
        "paid": {"type": "boolean"},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
        "kind": {"enum": ["bill", "receipt"]},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    },
    "required": ["number"],
    "$defs": {"line": {"type": "object", "properties": {"what": {"type": "string"}, "count": {"type": "integer"}}}},
}


@pytest.mark.parametrize(
    ("spec", "type_", "text", "value"),
    [
        ("text", pa.string(), "A cat.", "A cat."),
        ("bool", pa.bool_(), "Yes", True),
        ("bool", pa.bool_(), "No", False),
        ({"choices": ["a", "b c"]}, pa.string(), "b c", "b c"),
        ("int", pa.int64(), "-12", -12),
        ({"int": {"min": 0, "max": 9}}, pa.int64(), "7", 7),
        ("list[str]", pa.list_(pa.string()), '["a", "b"]', ["a", "b"]),
        ({"list[str]": {"max_items": 3}}, pa.list_(pa.string()), "[]", []),
        ({"regex": "[A-Z]{2}"}, pa.string(), "AB", "AB"),
        ("float", pa.float64(), "-0.25", -0.25),
        ({"float": {"min": 0, "max": 1}}, pa.float64(), "1", 1.0),
        ("date", pa.date32(), "2024-02-29", datetime.date(2024, 2, 29)),
        ({"list[choice]": ["a", "b"]}, pa.list_(pa.string()), '["b", "a", "b"]', ["b", "a"]),
        ({"list[choice]": {"choices": ["a", "b"], "max_items": 1}}, pa.list_(pa.string()), "[]", []),
        ({"json_schema": {"type": "integer"}}, pa.int64(), "5", 5),
        ({"json_schema": {"$schema": "draft-04", "$id": 5, "type": "integer"}}, pa.int64(), "5", 5),
    ],
)
def test_an_answer_has_a_type_and_a_value(spec: Any, type_: pa.DataType, text: str, value: Any) -> None:
    answer = parse_answer(spec)
    assert (answer.type, answer.parse(text)) == (type_, value)
    assert parse_answer(answer.spec) == answer
    assert not (answer.options and answer.constraint)
    pa.array([value, None], type_)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("bool", "yes"),
        ({"choices": ["a", "b"]}, "c"),
        ("int", "five"),
        ({"int": {"min": 0, "max": 9}}, "10"),
        ("list[str]", '["a", 1]'),
        ("list[str]", '["a"'),
        ({"json_schema": INVOICE}, '{"number": "1", "lines": [{"cou'),
        ({"json_schema": {"type": "integer"}}, "1" * 30),
        ({"json_schema": {"type": "integer"}}, "1e400"),
        ({"json_schema": {"type": "integer"}}, "0.5"),
        ({"json_schema": {"type": "number"}}, "1" * 400),
        ({"json_schema": True}, "[" * 100_000),
        ({"json_schema": {"type": "integer", "maximum": 5}}, "7"),
        ({"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 2}}, '["a"]'),
        ({"json_schema": {"enum": ["bill", "receipt"]}}, '"note"'),
        ({"json_schema": INVOICE}, '{"total": 5}'),
        ({"json_schema": INVOICE}, '{"number": "1", "kind": "note"}'),
        ({"json_schema": {"patternProperties": {"^a": {}}, "properties": {"b": {"type": "null"}}}}, '{"b": 1}'),
        ({"list[str]": {"max_items": 1}}, '["a", "b"]'),
    ],
)
def test_a_text_that_is_not_of_the_type_is_refused(spec: Any, text: str) -> None:
    with pytest.raises(ValueError):
        parse_answer(spec).parse(text)


@pytest.mark.parametrize("part", [{"pattern": "^(?:a+)+$"}, {"patternProperties": {"^(?:a+)+$": {"type": "null"}}}])
def test_values_are_not_checked_against_patterns(part: Any) -> None:
    """The grammar already enforces them; Python's `re` would take years on these texts and block the replica."""
    text = "a" * 60 + "!"
    either = {"anyOf": [{"type": "integer"}, part], "additionalProperties": {"type": "integer"}}
    assert json.loads(parse_answer({"json_schema": either}).parse(json.dumps({text: 1}))) == {text: 1}
    assert json.loads(parse_answer({"json_schema": either}).parse(json.dumps(text))) == text


@pytest.mark.parametrize("spec", ["int", "list[str]", {"int": {"min": -3, "max": 10**18 - 1}}, {"int": {"max": 3}}])
def test_a_spec_that_repeats_the_defaults_equals_the_spec_without_them(spec: Any) -> None:
    full = {"int": {"min": 1 - 10**18, "max": 10**18 - 1}, "list[str]": {"max_items": 100}}
    [(kind, bounds)] = [(spec, {})] if isinstance(spec, str) else spec.items()
    assert parse_answer({kind: {**full[kind], **bounds}}).spec == parse_answer(spec).spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("boolean", "is unknown; give text, bool, int"),
        ({"choices": [True, False]}, "quote it"),
        ({"choices": ["a"]}, "two or more"),
        ({"choices": ["a", "a"]}, "different"),
        ({"choices": "ab"}, "is not a list"),
        ({"int": {"min": 3, "max": 2}}, "min must be at most max"),
        ({"int": {"minimum": 3}}, "only min and max"),
        ({"int": {"min": 0.5}}, "not a whole number"),
        ({"list[str]": {"max_items": 0}}, "at least 1"),
        ({"float": {"min": 3, "max": 2}}, "min must be at most max"),
        ({"float": {"least": 3}}, "only min and max"),
        ({"list[choice]": {"max_items": 2}}, "only choices and max_items"),
        ({"list[choice]": [True, False]}, "quote it"),
        ({"regex": ""}, "not a pattern"),
        ({"json_schema": 5}, "neither a schema nor the path of a file"),
        ({"int": {}, "bool": {}}, "is unknown"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_is_allowed(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as info:
        parse_answer(spec)
    assert message in str(info.value)


def test_a_record_becomes_a_struct() -> None:
    shape = infer_shape(INVOICE)
    line = pa.struct({"what": pa.string(), "count": pa.int64()})
    assert shape.type == pa.struct(
        {
            "number": pa.string(),
            "total": pa.float64(),
            "paid": pa.bool_(),
            "lines": pa.list_(line),
            "kind": pa.string(),
            "either": pa.string(),  # JSON text: Arrow has no type for it
        }
    )
    value = {"number": "7", "total": None, "lines": [{"what": "tea", "count": 2.0}], "kind": "bill", "either": "5"}
    assert shape.convert(value) == {**value, "paid": None, "either": '"5"', "lines": [{"what": "tea", "count": 2}]}


def test_a_recursive_schema_ends_in_json_text() -> None:
    tree = {"type": "object", "properties": {"of": {"type": "array", "items": {"$ref": "#"}}}}
    shape = infer_shape(tree)
    assert shape.convert({"of": [{"of": [{"of": []}]}]}) == {"of": [{"of": ['{"of": []}']}]}
    assert shape.type == pa.struct({"of": pa.list_(pa.struct({"of": pa.list_(pa.string())}))})


@pytest.mark.parametrize(
    "schema",
    [
        *(True, {}, {"type": ["string", "integer"]}, {"$ref": "#/nowhere"}, {"enum": [1, "a"]}),
        *(
            {"type": 5},
            {"type": [{}]},
            {"enum": 5},
            {"anyOf": 5},
            {"properties": [1]},
            {"$ref": 5},
        ),  # for `parse_schema` to refuse
    ],
)
def test_values_without_an_arrow_type_become_json_text(schema: Any) -> None:
    shape = infer_shape(schema)
    assert shape.type == pa.string() and json.loads(shape.convert({"a": [1, None]})) == {"a": [1, None]}


def test_closing_objects_only_forbids_undeclared_properties() -> None:
    jsonschema.validate({"number": "7", "other": 1}, INVOICE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"number": "7", "other": 1}, close_objects(INVOICE))
    assert close_objects(INVOICE)["$defs"]["line"]["additionalProperties"] is False
    odd = {"properties": {"properties": {"type": "string"}, "enum": {"type": "object", "properties": {}}}}
    assert close_objects(odd)["properties"]["properties"] == {"type": "string"}
    assert close_objects({**INVOICE, "additionalProperties": True})["additionalProperties"] is True
    assert close_objects({"allOf": [INVOICE]}) == {"allOf": [INVOICE]}
    parts = {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}, "required": ["b"]}, {"required": ["a"]}]}
    assert close_objects(parts) == parts and infer_shape(parts).type == pa.string()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
_SCHEMAS = st.recursive(
    st.sampled_from([{"type": t} for t in ("string", "integer", "number", "boolean", "null")]) | st.just(True),
    lambda inner: (
        inner.map(lambda items: {"type": "array", "items": items})
        | st.dictionaries(st.text(), inner).map(lambda parts: {"type": "object", "properties": parts})
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
    ),
)


@given(_SCHEMAS, _VALUES)
def test_any_value_of_any_schema_fits_its_column_or_is_refused(schema: Any, value: Any) -> None:
    shape = infer_shape(schema)
    try:
        converted = shape.convert(value)
    except ValueError:
        return
    pa.array([converted], shape.type)


def test_repeated_items_are_dropped_as_json_schema_counts_them() -> None:
    schema = json.dumps({"type": "array", "uniqueItems": True})
    given = [1, 1.0, True, "1", {"a": [1, 2.5], "b": 2}, {"b": 2.0, "a": [1.0, 2.5]}, [0], [False]]
    assert drop_repeats(given, schema) == [1.0, True, "1", {"b": 2.0, "a": [1.0, 2.5]}, [0], [False]]
    validate_answer(drop_repeats(given, schema), schema)


def test_flags_report_cut_empty_invalid_and_repetitive_answers() -> None:
    text, yes, tags = parse_answer("text"), parse_answer("bool"), parse_answer("list[str]")
    loop = "the cat and " * 40
    assert find_flags(text, "A cat.", "A cat.", "stop") == ()
    assert find_flags(text, loop, loop, "length") == ("truncated", "repetition")
    assert find_flags(text, " \n", " \n", "stop") == ("empty",)
    assert find_flags(tags, '["a', None, "length") == ("truncated", "invalid")
    assert find_flags(yes, "Yes", True, "stop") == ()


def test_loops_are_repetitive_and_prose_is_not() -> None:
    prose = (
        "Two dogs run along a beach at low tide. The one in front, a brown terrier, carries a stick that is longer "
        "than itself; the other one follows with its tongue out. Behind them the sea is grey, and a boat with a red "
        "sail leans into the wind."
    )
    assert not is_repetitive(prose) and not is_repetitive("red red red red")
    assert is_repetitive("A photo of a photo of " * 20) and is_repetitive("ha" * 100)
