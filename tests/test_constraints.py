"""Answers of random weights, held to schemas and patterns; what is refused; what constraints leave alone."""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal
from uuid import UUID

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator as Validator
from pydantic import BaseModel, ConfigDict, Field

from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.kv_cache import DecodeStep, KVCache
from ovis_model.engine.model_runner import ModelRunner
from ovis_model.engine.sampling import unpack_masks
from ovis_model.engine.scheduler import Budget
from ovis_model.grammar import guides as constraints
from ovis_model.grammar.guides import Guides, check
from ovis_model.grammar.json_schema import validate_answer
from ovis_model.inputs.processor import Processor
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Completion, Constraint, Request, RequestError, SamplingParams
from tests.support.answer_types import PATTERNS, SCHEMAS, record
from tests.support.engines import compute_logits, make_golden_requests
from tests.support.golden_data import checkpoint_dir

CHECKPOINT = checkpoint_dir("tiny56-tied")
TOKENIZER = load_tokenizer(CHECKPOINT)
DIGIT = Constraint("json_schema", '{"type": "integer", "minimum": 0, "maximum": 9}')
FREE = SamplingParams(max_new_tokens=40, temperature=1.0, seed=5)


@cache
def engine() -> OvisEngine:
    loaded = OvisEngine.from_pretrained(str(CHECKPOINT), device="cpu", dtype="float32")
    assert isinstance(loaded, OvisEngine)
    return loaded


@cache
def processor() -> Processor:
    return Processor.from_pretrained(CHECKPOINT)


@cache
def build_request() -> Request:
    return processor().build_request("Describe.")


def held_to(constraint: Constraint, **options: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 200, "temperature": 1.0, "constraint": constraint, **options})


def schema_of(schema: object) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


def one_of(*schemas: object) -> object:
    return {"oneOf": list(schemas)}


def answers(params: Sequence[SamplingParams], **options: Any) -> list[Completion]:
    model = OvisEngine.from_model(engine().model, tokenizer=TOKENIZER, **options)
    return model.generate([build_request()] * len(params), params)


def text_of(completion: Completion) -> str:
    return processor().detokenize(completion.output_ids)


@pytest.mark.parametrize("rounds", [7, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_every_answer_that_ends_is_valid_json_by_its_schema(rounds: int) -> None:
    """43 schemas: 301 answers, or 2,580."""
    wanted = [schema for _ in range(rounds) for schema in SCHEMAS.values()]
    for schema in SCHEMAS.values():
        check(schema_of(schema))
    found = answers([held_to(schema_of(schema), seed=seed) for seed, schema in enumerate(wanted)])
    num_ended = 0
    for schema, completion in zip(wanted, found, strict=True):
        if completion.finish_reason == "stop":
            value = json.loads(text_of(completion))
            Validator(schema, format_checker=Validator.FORMAT_CHECKER).validate(value)
            validate_answer(value, json.dumps(schema))
            num_ended += 1
        else:
            assert len(completion.output_ids) == 200
    print(f"{len(found)} answers, {len(found) - num_ended} of them cut off")
    assert num_ended > 0.85 * len(found)


def test_every_answer_that_ends_matches_its_pattern() -> None:
    wanted = [pattern for _ in range(10) for pattern in PATTERNS]
    found = answers([held_to(Constraint("regex", pattern), seed=seed) for seed, pattern in enumerate(wanted)])
    for pattern, completion in zip(wanted, found, strict=True):
        assert completion.finish_reason == "length" or re.fullmatch(pattern, text_of(completion))
    assert sum(completion.finish_reason == "stop" for completion in found) > 0.85 * len(found)


def test_a_schema_that_pydantic_writes_is_supported() -> None:
    schema = Receipt.model_json_schema()
    check(schema_of(schema))
    for completion in answers([held_to(schema_of(schema), seed=seed, max_new_tokens=400) for seed in range(5)]):
        if completion.finish_reason == "stop":
            Receipt.model_validate_json(text_of(completion))


class Item(BaseModel):
    """What is described here is dropped."""

    name: Annotated[str, Field(min_length=1, max_length=9)]
    price: Annotated[float, Field(gt=0, lt=100)] | None = None


class Cash(BaseModel):
    kind: Literal["cash"]


class Card(BaseModel):
    kind: Literal["card"]
    digits: Annotated[str, Field(pattern=r"^\d{4}$")]


class Receipt(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: UUID
    day: datetime.date
    at: datetime.datetime
    items: Annotated[list[Item], Field(max_length=2)]
    paid: Annotated[Cash | Card, Field(discriminator="kind")]
    is_printed: bool = Field(default=True, title="Printed?", examples=[False])


@settings(max_examples=60)
@given(data=st.data())
def test_every_schema_that_is_supported_is_honoured(data: st.DataObject) -> None:
    """Bounds, lengths, patterns and their combinations; answers byte by byte, drawn evenly or from a few bytes."""
    schema = data.draw(anything)
    try:
        check(schema_of(schema))
    except ValueError:
        return
    state = constraints._matcher(schema_of(schema), constraints._byte_trie())
    rng, favoured = data.draw(st.randoms(use_true_random=True)), data.draw(st.sampled_from(["", "9.0", 'nu,:"}]']))
    answer = bytearray()
    while len(answer) < 80:
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little"))
        byte = int(rng.choice([b for b in allowed if chr(b) in favoured] or list(allowed)))
        if byte == END:
            Validator(schema).validate(json.loads(answer.decode()))
            validate_answer(json.loads(answer.decode()), json.dumps(schema))
            return
        assert state.consume_token(byte)
        answer.append(byte)


END = 256
bounds = st.one_of(st.integers(-30, 30), st.decimals(-2, 2, places=3).map(float), st.sampled_from([1e-9, 1e15, 2**60]))
names = st.sampled_from(["a", "b", "ab"])
patterns = st.sampled_from(
    ["^a", "b$", "[0-9]{2}", r"^\S+$", r"^\w+\.\d+$", "^(?:ab|cd)+$", r"[^a-z]$", '^["\\\\]+$', "é|ü"]
)
numbers = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number", ["number", "null"]])},
    optional={
        **dict.fromkeys(("minimum", "exclusiveMinimum"), bounds.filter(lambda bound: bound <= 2**53)),
        **dict.fromkeys(("maximum", "exclusiveMaximum"), bounds),
        "multipleOf": st.sampled_from([1, 3, 10, 25]),
    },
)
strings = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"minLength": st.integers(0, 3), "maxLength": st.integers(2, 8), "pattern": patterns},
)
anything = st.recursive(
    numbers | strings | st.just({"enum": ["a", 1, None, [0.5]]}),
    lambda part: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": part}, optional={"maxItems": st.integers(0, 3)}),
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(names, part, max_size=2)},
            optional={
                "required": st.lists(names, max_size=2, unique=True),
                "additionalProperties": part | st.booleans(),
                "patternProperties": st.dictionaries(st.sampled_from(["^a", "^b"]), part, max_size=2),
                "maxProperties": st.integers(0, 2),
            },
        ),
        st.lists(part, min_size=1, max_size=2).flatmap(
            lambda parts: st.sampled_from(["anyOf", "oneOf", "allOf"]).map(lambda name: {name: parts})
        ),
    ),
    max_leaves=4,
)


def test_a_cut_answer_is_the_beginning_of_a_whole_one() -> None:
    """And the same row, with more tokens to spend, goes on from there."""
    constraint = schema_of(SCHEMAS["invoice"])
    short, long = answers([held_to(constraint, seed=1, max_new_tokens=n) for n in (10, 300)])
    assert (short.finish_reason, long.finish_reason) == ("length", "stop")
    assert short.output_ids.tolist() == long.output_ids[:10].tolist()


def test_rows_beside_each_other_do_not_touch_each_other() -> None:
    """Free and constrained, greedy, sampled and penalised; also over slots that are used again."""
    kinds = [SCHEMAS["bounding boxes"], SCHEMAS["pattern and lengths"], SCHEMAS["integer"]]
    mixed = [FREE, SamplingParams(max_new_tokens=40), *(held_to(schema_of(kind), seed=2) for kind in kinds)]
    mixed += [held_to(schema_of(kinds[0]), temperature=0.0, repetition_penalty=1.3, max_new_tokens=60)]
    mixed += [held_to(Constraint("regex", "[a-z]{3,30}"), seed=3, top_p=0.9, top_k=20), FREE]
    alone = [answers([params])[0] for params in mixed]
    together = answers(mixed * 2, budget=Budget(kv_tokens=2000, slots=3))
    for one, other in zip(alone * 2, together, strict=True):
        assert one.output_ids.tolist() == other.output_ids.tolist()
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)


def test_no_added_token_and_no_padding_of_the_logits_in_an_answer() -> None:
    """The pattern allows what added tokens spell; at this temperature one token in thirty would be one of them."""
    added = set(TOKENIZER.get_added_tokens_decoder())
    anything = Constraint("regex", r"(?:.|\n)*")
    for completion in answers(
        [held_to(anything, temperature=50.0, seed=seed, max_new_tokens=60) for seed in range(20)]
    ):
        *inner, last = completion.output_ids.tolist()
        assert not added & set(inner)
        assert max(inner) < TOKENIZER.get_vocab_size()
        assert (last in engine().config.eos_token_ids) == (completion.finish_reason == "stop")


def test_log_probabilities_are_the_models_own() -> None:
    """Those of an answer without a choice are those of scoring it in one pass, not zero."""
    [question, *_] = make_golden_requests("tiny56-tied")
    [completion] = engine().generate([question], held_to(schema_of({"const": "red"}), temperature=0.0))
    ids = np.concatenate([question.input_ids, completion.output_ids[:-1]])
    with torch.inference_mode():
        logits = compute_logits(engine().model, Request(ids, question.tiles, question.tile_sizes))
    scores = logits[len(question.input_ids) - 1 :].log_softmax(-1)
    wanted = scores.gather(1, torch.from_numpy(completion.output_ids).long()[:, None]).mean()
    assert text_of(completion) == '"red"'
    assert completion.mean_logprob == pytest.approx(float(wanted), abs=1e-4)
    assert completion.mean_logprob < -1


def test_rows_that_start_again_after_running_out_of_memory_start_their_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [held_to(schema_of(SCHEMAS["invoice"]), seed=seed, max_new_tokens=60) for seed in range(5)]
    wanted = [completion.output_ids.tolist() for completion in answers(params)]
    step, num_steps = DecodeStep.__init__, 0

    def limited(self: DecodeStep, cache: KVCache, lengths: torch.Tensor, longest: int) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps in (7, 30):
            raise torch.OutOfMemoryError("once more")
        step(self, cache, lengths, longest)

    monkeypatch.setattr(DecodeStep, "__init__", limited)
    assert [completion.output_ids.tolist() for completion in answers(params)] == wanted
    assert num_steps > 30


def test_a_grammar_is_compiled_once_and_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that needs it waits for it, not the call that hands the row over, and not the pass over its prompt."""
    compiled, started, prefilled = [], threading.Event(), threading.Event()
    compile_now, hidden_now = constraints._matcher, ModelRunner.run_spans

    def slow(constraint: Constraint, trie: Any) -> Any:
        started.set()
        assert prefilled.wait(100)
        compiled.append(constraint)
        return compile_now(constraint, trie)

    def counted(self: ModelRunner, *arguments: Any) -> Any:
        hidden = hidden_now(self, *arguments)
        prefilled.set()
        return hidden

    monkeypatch.setattr(constraints, "_matcher", slow)
    monkeypatch.setattr(ModelRunner, "run_spans", counted)
    model = EngineCore(engine().model, tokenizer=TOKENIZER)
    rows = model.enqueue([build_request()] * 6, [held_to(DIGIT, seed=seed) for seed in range(6)])
    assert started.wait(100)
    assert not compiled
    while not all(row.has_left for row in rows):
        model.step()
    assert compiled == [DIGIT]
    assert {int(text_of(row.make_completion())) for row in rows} <= set(range(10))


def test_choices_have_no_use_for_a_constraint_and_take_none_from_the_rows_beside_them() -> None:
    both = held_to(DIGIT, choices=((17, 566), (9, 566)), temperature=0.0)
    requests = [replace(build_request(), group=None) for _ in range(3)]  # not siblings: in one pass
    model = OvisEngine.from_model(engine().model, tokenizer=TOKENIZER)
    found = model.generate(requests, [both, held_to(DIGIT, seed=1), held_to(DIGIT, seed=2)])
    assert found[0].output_ids.tolist() in [[17, 566], [9, 566]]
    assert {int(text_of(completion)) for completion in found[1:]} <= set(range(10))


def test_a_constraint_that_fails_later_fails_its_row_alone() -> None:
    endless = schema_of({"type": "string", "pattern": "not supported: (?=a)"})
    nothing = schema_of({"$ref": "#"})
    model = EngineCore(engine().model, tokenizer=TOKENIZER)
    params = [FREE, held_to(endless), held_to(nothing), held_to(DIGIT, seed=1), FREE]
    rows = model.enqueue([build_request()] * 5, params)
    while not all(row.has_left for row in rows):
        model.step()
    with pytest.raises(RequestError, match="cannot go on within its constraint"):
        answers([held_to(nothing)])
    free = answers([FREE])[0].output_ids.tolist()
    assert [rows[place].make_completion().output_ids.tolist() for place in (0, 4)] == [free, free]
    assert 0 <= int(text_of(rows[3].make_completion())) <= 9
    with pytest.raises(RequestError, match="begins neither"):
        rows[1].make_completion()
    with pytest.raises(RequestError, match="cannot go on within its constraint"):
        rows[2].make_completion()


def test_masks_agree_with_spelling_every_token() -> None:
    """Of a pattern, over the whole vocabulary: a token is allowed where its text may go on."""
    guides = Guides(TOKENIZER, 640, engine().config.eos_token_ids)
    guide = guides.guide(Constraint("regex", "[a-h ]{0,4}"))
    mask = unpack_masks(torch.from_numpy(guides.masks([(guide, [])]).result()), 640)[0]
    texts = [processor().detokenize([token]) for token in range(TOKENIZER.get_vocab_size())]
    wanted = [bool(text) and re.fullmatch("[a-h ]{1,4}", text) is not None for text in texts]
    for eos in engine().config.eos_token_ids:
        wanted[eos] = True
    assert mask[: len(wanted)].tolist() == wanted
    assert not mask[len(wanted) :].any()


def test_the_bits_of_a_mask() -> None:
    masks = torch.tensor([[0b00000101, 0b10000000], [0, 0b00000010]], dtype=torch.uint8)
    assert [row.nonzero().flatten().tolist() for row in unpack_masks(masks, 16)] == [[0, 2, 15], [9]]
    assert unpack_masks(masks, 10).shape == (2, 10)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "maxLenght": 3}, "#: the keyword 'maxLenght' is not supported"),
        (record(a={"not": {"type": "null"}}), "#/properties/a: the keyword 'not' is not supported"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "contains": {"const": 1}}, "'contains'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"dependentSchemas": {}}, "'dependentSchemas'"),
        ({"dependentRequired": {}}, "'dependentRequired'"),
        ({"propertyNames": {}}, "'propertyNames'"),
        ({"unevaluatedProperties": False}, "'unevaluatedProperties'"),
        ({"$dynamicRef": "#a"}, "'\\$dynamicRef'"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
        ({"$defs": {"a": {"$id": "https://example.com"}}}, "#/\\$defs/a: the keyword '\\$id'"),
        ({"type": "string", "format": "iban"}, "#/format: 'iban' must be a supported format: date, "),
        ({"$ref": "https://example.com/a.json"}, "#/\\$ref: .* others are not fetched"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]}, "or use 'anyOf'"),
        (one_of(record(kind={"enum": ["a", "b"]}), record(kind={"enum": ["b", "c"]})), "or use 'anyOf'"),
        (one_of(*({**record(kind={"const": kind}), "required": []} for kind in "ab")), "or use 'anyOf'"),
        (one_of(*({"properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab")), "or use 'anyOf'"),
        (one_of({"$ref": "#/oneOf/0"}, record(kind={"const": "b"})), "or use 'anyOf'"),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}, "'minProperties' over 1"),
        ({"const": 2**53 + 1}, "#/const: '9007199254740993' must be a number within"),
        ({"minimum": 1e300}, "#/minimum: .* must be a number within"),
        ({"minimum": 0.1234567890123456}, "#/minimum: .* at most 15 digits"),
        ({"type": "number", "multipleOf": 0.01}, "#/multipleOf: '0.01' must be a whole number"),
        ({"enum": ["a\x01"]}, "#/enum/0: .* without control characters"),
        ({"properties": {"a\x7f": {}}}, "#/properties: .* without control characters"),
        ({"const": ["\ud800"]}, "#/const/0: .* lone surrogates"),
        ({"enum": []}, "#/enum: .* a list that is not empty"),
        ({"type": "text"}, "#/type: 'text' must be one of array"),
        ({"maxItems": -1}, "#/maxItems: '-1' must be a whole number"),
        ({"maxItems": 10**9}, "#/maxItems: '1000000000' must be a whole number"),
        ({"items": [{}]}, "#/items: .* must be a schema"),
        ({"pattern": "a(?=b)"}, r"#/pattern: pattern .* position 1"),
        ({"patternProperties": {"a++": {}}}, r"#/patternProperties: pattern .* position 1"),
        ({"minLength": 2, "maxLength": 1, "type": "string"}, "minLength"),
        ({"$ref": "#"}, "no answer satisfies"),
        (1, "must be a schema"),
        (True, "a schema is an object"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_with_its_keyword(schema: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(schema_of(schema))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the schema is not JSON"),
        ("[" * 200_000, "over the limit"),
        ("[" * 100_000, "the schema is not JSON"),
        ('{"minimum": NaN}', "#/minimum: 'nan'"),
        ('{"items":' * 100 + "true" + "}" * 100, "more than 64 names deep"),
        ('{"const":' + "[" * 100 + "]" * 100 + "}", "more than 64 names deep"),
    ],
)
def test_a_schema_that_is_broken_or_huge_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Constraint("json_schema", text))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(b", "unterminated subpattern at position 1"),
        ("x*(?=y)", "at position 2"),
        ("(?i)x", "at position 0"),
        (r"(a)\1", "at position 3"),
        (r"\bx", "at position 0"),
        (r"a\D", r"write '\[\^0-9\]' at position 1"),
        (r"[^\w]", "in a negated class"),
        ("[a&&b]", "'&&' in a class; escape it at position 2"),
        ("[[:alpha:]]", "at position 1"),
        ("[]a]", "at position 0"),
        ("a{,3}", "write '{0,' at position 1"),
        ("a*+b", "possessive"),
        ("a^b", "lookarounds not supported"),
        ("a" * 10_001, "over the limit of 10000"),
    ],
)
def test_a_pattern_that_means_several_things_is_refused_with_its_position(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Constraint("regex", pattern))


def test_a_large_schema_is_checked_in_a_second() -> None:
    schema = record(**{f"field {n}": SCHEMAS["invoice"]["properties"]["lines"] for n in range(60)})
    started_s = time.process_time()
    check(schema_of(schema), TOKENIZER)
    assert time.process_time() - started_s < 1


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop=("a",), constraint=DIGIT)
    with pytest.raises(ValueError, match="kind='grammar'"):
        Constraint("grammar", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need a tokenizer"):
        OvisEngine.from_model(engine().model).generate([build_request()], held_to(DIGIT))


def test_rows_without_constraints_are_chosen_in_the_fast_way() -> None:
    greedy = SamplingParams(max_new_tokens=5)
    model = EngineCore(engine().model, tokenizer=TOKENIZER)
    letters = Constraint("regex", "[a-z]{30}")
    rows = model.enqueue([build_request()] * 2, [greedy, held_to(letters, temperature=0.0)])
    model.step()
    assert model.runner._sampler is not None
    assert not model.runner._sampler.is_greedy
    while not all(row.has_left for row in rows):
        model.step()
    model.enqueue([build_request()], [greedy])
    model.step()
    assert model.runner._sampler is not None
    assert model.runner._sampler.is_greedy
