"""Constrained answers of a model with random weights follow their schemas and patterns, and leave other rows alone."""

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
from ovis_model.grammar import guides as guides_module
from ovis_model.grammar.guides import Guides, check
from ovis_model.grammar.json_schema import validate_answer
from ovis_model.inputs.processor import Processor
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Completion, Constraint, ConstraintExhausted, Request, RequestError, SamplingParams
from tests.support.answer_types import PATTERNS, SCHEMAS, record
from tests.support.engines import compute_logits, make_golden_requests
from tests.support.golden_data import checkpoint_dir

CHECKPOINT = checkpoint_dir("tiny56-tied")
TOKENIZER = load_tokenizer(CHECKPOINT)
DIGIT = Constraint("json_schema", '{"type": "integer", "minimum": 0, "maximum": 9}')
FREE = SamplingParams(max_new_tokens=40, temperature=1.0, seed=5)


@cache
def get_engine() -> OvisEngine:
    loaded = OvisEngine.from_pretrained(str(CHECKPOINT), device="cpu", dtype="float32")
    assert isinstance(loaded, OvisEngine)
    return loaded


@cache
def get_processor() -> Processor:
    return Processor.from_pretrained(CHECKPOINT)


@cache
def build_request() -> Request:
    return get_processor().build_request("Describe.")


def constrain(constraint: Constraint, **options: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 200, "temperature": 1.0, "constraint": constraint, **options})


def to_constraint(schema: object) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


def make_one_of(*schemas: object) -> object:
    return {"oneOf": list(schemas)}


def generate_answers(params: Sequence[SamplingParams], **options: Any) -> list[Completion]:
    model = OvisEngine.from_model(get_engine().model, tokenizer=TOKENIZER, **options)
    return model.generate([build_request()] * len(params), params)


def detokenize(completion: Completion) -> str:
    return get_processor().detokenize(completion.output_ids)


@pytest.mark.parametrize("rounds", [7, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_every_finished_answer_is_valid_by_its_schema(rounds: int) -> None:
    """43 schemas yield 301 answers, or 2,580 with --run-slow."""
    wanted = [schema for _ in range(rounds) for schema in SCHEMAS.values()]
    for schema in SCHEMAS.values():
        check(to_constraint(schema))
    found = generate_answers([constrain(to_constraint(schema), seed=seed) for seed, schema in enumerate(wanted)])
    num_ended = 0
    for schema, completion in zip(wanted, found, strict=True):
        if completion.finish_reason == "stop":
            value = json.loads(detokenize(completion))
            Validator(schema, format_checker=Validator.FORMAT_CHECKER).validate(value)
            validate_answer(value, json.dumps(schema))
            num_ended += 1
        else:
            assert len(completion.output_ids) == 200
    print(f"{len(found)} answers, {len(found) - num_ended} of them cut off")
    assert num_ended > 0.85 * len(found)


def test_every_finished_answer_matches_its_pattern() -> None:
    wanted = [pattern for _ in range(10) for pattern in PATTERNS]
    found = generate_answers(
        [constrain(Constraint("regex", pattern), seed=seed) for seed, pattern in enumerate(wanted)]
    )
    for pattern, completion in zip(wanted, found, strict=True):
        assert completion.finish_reason == "length" or re.fullmatch(pattern, detokenize(completion))
    assert sum(completion.finish_reason == "stop" for completion in found) > 0.85 * len(found)


def test_schemas_of_pydantic_models_are_supported() -> None:
    schema = Receipt.model_json_schema()
    check(to_constraint(schema))
    for completion in generate_answers(
        [constrain(to_constraint(schema), seed=seed, max_new_tokens=400) for seed in range(5)]
    ):
        if completion.finish_reason == "stop":
            Receipt.model_validate_json(detokenize(completion))


class Item(BaseModel):
    """A line of the receipt; this description becomes part of the schema and is ignored."""

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
def test_every_supported_schema_is_enforced(data: st.DataObject) -> None:
    """Schemas combine bounds, lengths and patterns; answers are drawn byte by byte, evenly or from a few bytes."""
    schema = data.draw(anything)
    try:
        check(to_constraint(schema))
    except ValueError:
        return
    state = guides_module._start_matcher(to_constraint(schema), guides_module._make_byte_trie())
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


def test_a_truncated_answer_is_a_prefix_of_the_full_one() -> None:
    """The same row with a larger token limit continues from there."""
    constraint = to_constraint(SCHEMAS["invoice"])
    short, long = generate_answers([constrain(constraint, seed=1, max_new_tokens=n) for n in (10, 300)])
    assert (short.finish_reason, long.finish_reason) == ("length", "stop")
    assert short.output_ids.tolist() == long.output_ids[:10].tolist()


def test_rows_in_a_batch_answer_as_they_do_alone() -> None:
    """Rows are free and constrained, greedy, sampled and penalised; slots are reused."""
    kinds = [SCHEMAS["bounding boxes"], SCHEMAS["pattern and lengths"], SCHEMAS["integer"]]
    mixed = [FREE, SamplingParams(max_new_tokens=40), *(constrain(to_constraint(kind), seed=2) for kind in kinds)]
    mixed += [constrain(to_constraint(kinds[0]), temperature=0.0, repetition_penalty=1.3, max_new_tokens=60)]
    mixed += [constrain(Constraint("regex", "[a-z]{3,30}"), seed=3, top_p=0.9, top_k=20), FREE]
    alone = [generate_answers([params])[0] for params in mixed]
    together = generate_answers(mixed * 2, budget=Budget(kv_tokens=2000, slots=3))
    for one, other in zip(alone * 2, together, strict=True):
        assert one.output_ids.tolist() == other.output_ids.tolist()
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)


def test_an_answer_has_no_special_tokens_and_no_padding_ids() -> None:
    """The pattern allows their text; at this temperature one sampled token in thirty would be an added one."""
    added = set(TOKENIZER.get_added_tokens_decoder())
    anything = Constraint("regex", r"(?:.|\n)*")
    for completion in generate_answers(
        [constrain(anything, temperature=50.0, seed=seed, max_new_tokens=60) for seed in range(20)]
    ):
        *inner, last = completion.output_ids.tolist()
        assert not added & set(inner)
        assert max(inner) < TOKENIZER.get_vocab_size()
        assert (last in get_engine().config.eos_token_ids) == (completion.finish_reason == "stop")


def test_log_probabilities_are_the_models_own() -> None:
    """If the schema leaves a single answer, its log-probability equals that of scoring it in one pass, not zero."""
    [question, *_] = make_golden_requests("tiny56-tied")
    [completion] = get_engine().generate([question], constrain(to_constraint({"const": "red"}), temperature=0.0))
    ids = np.concatenate([question.input_ids, completion.output_ids[:-1]])
    with torch.inference_mode():
        logits = compute_logits(get_engine().model, Request(ids, question.tiles, question.tile_sizes))
    scores = logits[len(question.input_ids) - 1 :].log_softmax(-1)
    wanted = scores.gather(1, torch.from_numpy(completion.output_ids).long()[:, None]).mean()
    assert detokenize(completion) == '"red"'
    assert completion.mean_logprob == pytest.approx(float(wanted), abs=1e-4)
    assert completion.mean_logprob < -1


def test_rows_that_restart_after_out_of_memory_repeat_their_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [constrain(to_constraint(SCHEMAS["invoice"]), seed=seed, max_new_tokens=60) for seed in range(5)]
    wanted = [completion.output_ids.tolist() for completion in generate_answers(params)]
    step, num_steps = DecodeStep.__init__, 0

    def run_out_of_memory(self: DecodeStep, cache: KVCache, lengths: torch.Tensor, longest: int) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps in (7, 30):
            raise torch.OutOfMemoryError("once more")
        step(self, cache, lengths, longest)

    monkeypatch.setattr(DecodeStep, "__init__", run_out_of_memory)
    assert [completion.output_ids.tolist() for completion in generate_answers(params)] == wanted
    assert num_steps > 30


def test_a_grammar_is_compiled_once_without_blocking_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first decode step of the row waits for the grammar; enqueuing and prefill do not."""
    compiled, started, prefilled = [], threading.Event(), threading.Event()
    compile_now, hidden_now = guides_module._start_matcher, ModelRunner.run_spans

    def compile_slowly(constraint: Constraint, trie: Any) -> Any:
        started.set()
        assert prefilled.wait(100)
        compiled.append(constraint)
        return compile_now(constraint, trie)

    def run_and_signal(self: ModelRunner, *arguments: Any) -> Any:
        hidden = hidden_now(self, *arguments)
        prefilled.set()
        return hidden

    monkeypatch.setattr(guides_module, "_start_matcher", compile_slowly)
    monkeypatch.setattr(ModelRunner, "run_spans", run_and_signal)
    model = EngineCore(get_engine().model, tokenizer=TOKENIZER)
    rows = model.enqueue([build_request()] * 6, [constrain(DIGIT, seed=seed) for seed in range(6)])
    assert started.wait(100)
    assert not compiled
    while not all(row.has_left for row in rows):
        model.step()
    assert compiled == [DIGIT]
    assert {int(detokenize(row.make_completion())) for row in rows} <= set(range(10))


def test_a_row_of_choices_ignores_its_constraint_and_leaves_other_rows_theirs() -> None:
    both = constrain(DIGIT, choices=((17, 566), (9, 566)), temperature=0.0)
    requests = [replace(build_request(), group=None) for _ in range(3)]  # no siblings, so they share one pass
    model = OvisEngine.from_model(get_engine().model, tokenizer=TOKENIZER)
    found = model.generate(requests, [both, constrain(DIGIT, seed=1), constrain(DIGIT, seed=2)])
    assert found[0].output_ids.tolist() in [[17, 566], [9, 566]]
    assert {int(detokenize(completion)) for completion in found[1:]} <= set(range(10))


def test_a_constraint_that_fails_during_generation_fails_only_its_row() -> None:
    endless = to_constraint({"type": "string", "pattern": "not supported: (?=a)"})
    nothing = to_constraint({"$ref": "#"})
    model = EngineCore(get_engine().model, tokenizer=TOKENIZER)
    params = [FREE, constrain(endless), constrain(nothing), constrain(DIGIT, seed=1), FREE]
    rows = model.enqueue([build_request()] * 5, params)
    while not all(row.has_left for row in rows):
        model.step()
    with pytest.raises(RequestError, match="cannot be continued within its constraint"):
        generate_answers([constrain(nothing)])
    free = generate_answers([FREE])[0].output_ids.tolist()
    assert [rows[place].make_completion().output_ids.tolist() for place in (0, 4)] == [free, free]
    assert 0 <= int(detokenize(rows[3].make_completion())) <= 9
    with pytest.raises(RequestError, match="begins neither"):
        rows[1].make_completion()
    with pytest.raises(RequestError, match="cannot be continued within its constraint"):
        rows[2].make_completion()


def test_a_row_that_exhausts_a_grammar_leaves_it_whole_for_the_others() -> None:
    """The text needs more states than the lexer may have; rows that answer false never reach it."""
    words = {"type": "string", "minLength": 1, "maxLength": 100_000, "pattern": r"^(?:\S+\s+){0,99}\S+$"}
    constraint = to_constraint(make_one_of(record(t={"const": False}), record(t={"const": True}, text=words)))
    model = OvisEngine.from_model(get_engine().model, tokenizer=TOKENIZER)
    params = [constrain(constraint, seed=seed, max_new_tokens=25) for seed in (0, 4, 5)]
    alone = [generate_outcome(own) for own in params]
    assert {"False", "True"} == {str(outcome.startswith("{")) for outcome in alone}
    assert all("steps of the lexer per token" in outcome for outcome in alone if not outcome.startswith("{"))
    with pytest.raises(ConstraintExhausted) as info:
        model.generate([build_request()] * 3, params)
    together = [
        str(outcome) if isinstance(outcome, RequestError) else detokenize(outcome) for outcome in info.value.outcomes
    ]
    assert together == alone == [generate_outcome(own, model) for own in params]


def generate_outcome(params: SamplingParams, model: OvisEngine | None = None) -> str:
    """Return the text or the error of one request, by default from an engine of its own."""
    model = model or OvisEngine.from_model(get_engine().model, tokenizer=TOKENIZER)
    try:
        return detokenize(model.generate([build_request()], params)[0])
    except RequestError as error:
        return str(error)


def test_a_mask_allows_exactly_the_tokens_whose_text_matches() -> None:
    """The mask is compared with the pattern over the whole vocabulary."""
    guides = Guides(TOKENIZER, 640, get_engine().config.eos_token_ids)
    guide = guides.make_guide(Constraint("regex", "[a-h ]{0,4}"))
    mask = unpack_masks(torch.from_numpy(guides.compute_masks([(guide, [])]).result()), 640)[0]
    texts = [get_processor().detokenize([token]) for token in range(TOKENIZER.get_vocab_size())]
    wanted = [bool(text) and re.fullmatch("[a-h ]{1,4}", text) is not None for text in texts]
    for eos in get_engine().config.eos_token_ids:
        wanted[eos] = True
    assert mask[: len(wanted)].tolist() == wanted
    assert not mask[len(wanted) :].any()


def test_masks_unpack_their_lowest_bits_first() -> None:
    masks = torch.tensor([[0b00000101, 0b10000000], [0, 0b00000010]], dtype=torch.uint8)
    assert [row.nonzero().flatten().tolist() for row in unpack_masks(masks, 16)] == [[0, 2, 15], [9]]
    assert unpack_masks(masks, 10).shape == (2, 10)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "maxLenght": 3}, "#: the keyword 'maxLenght' is not supported"),
        ({"type": "array", "minitems": 3}, "did you mean 'minItems'"),
        ({"type": "number", "max": 3}, "did you mean 'maximum'"),
        (record(a={"not": {"type": "null"}}), "#/properties/a: the keyword 'not' is not supported"),
        ({"type": "array", "contains": {"const": 1}}, "'contains'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"propertyNames": {"format": "date"}}, "'propertyNames'"),
        ({"allOf": [{}], "unevaluatedProperties": False}, "'unevaluatedProperties'"),
        (
            {
                "oneOf": [record(kind={"type": "string"}), record(a={})],
                "discriminator": {"propertyName": "kind"},
            },
            "#: the keyword 'discriminator' is not supported for parts whose property 'kind'",
        ),
        ({"$dynamicRef": "#a"}, "'\\$dynamicRef'"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
        (
            {"$defs": {"a": {"$id": "https://a.com", "items": {"$ref": "#/$defs/b"}}}},
            "#/\\$defs/a: the keyword '\\$id'",
        ),
        ({"$ref": "https://example.com/a.json"}, "#/\\$ref: .* others are not fetched"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]}, "or use 'anyOf'"),
        (make_one_of(record(kind={"enum": ["a", "b"]}), record(kind={"enum": ["b", "c"]})), "or use 'anyOf'"),
        (make_one_of(*({"properties": {kind: {"type": "null"}}} for kind in "ab")), "or use 'anyOf'"),
        (make_one_of({"$ref": "#/oneOf/0"}, record(kind={"const": "b"})), "or use 'anyOf'"),
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
        ({"items": 5}, "#/items: .* must be a schema"),
        (
            {"type": "string", "maxLength": 1_000_000, "pattern": r"^(?:\S+\s+){0,99}\S+$"},
            "answers exceed its limits: .* steps of the lexer per token",
        ),
        ({"pattern": "a(?=b)"}, r"#/pattern: pattern .* position 1"),
        ({"patternProperties": {"a++": {}}}, r"#/patternProperties: pattern .* position 1"),
        ({"minLength": 2, "maxLength": 1, "type": "string"}, "minLength"),
        ({"$ref": "#"}, "no answer satisfies"),
        (1, "must be a schema"),
        (True, "a schema is an object"),
    ],
)
def test_an_unsupported_schema_is_refused_with_its_keyword(schema: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(to_constraint(schema))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the schema is not JSON"),
        ("[" * 2_000_000, "over the limit"),
        ("[" * 100_000, "the schema is not JSON"),
        ('{"minimum": NaN}', "#/minimum: 'nan'"),
        ('{"items":' * 100 + "true" + "}" * 100, "more than 64 names deep"),
        ('{"const":' + "[" * 100 + "]" * 100 + "}", "more than 64 names deep"),
    ],
)
def test_a_broken_or_huge_schema_is_refused(text: str, message: str) -> None:
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
def test_an_unsupported_pattern_is_refused_with_its_position(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Constraint("regex", pattern))


def test_a_large_schema_is_checked_within_a_second() -> None:
    schema = record(**{f"field {n}": SCHEMAS["invoice"]["properties"]["lines"] for n in range(60)})
    started_s = time.process_time()
    check(to_constraint(schema), TOKENIZER)
    assert time.process_time() - started_s < 1


def test_wrong_combinations_of_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop=("a",), constraint=DIGIT)
    with pytest.raises(ValueError, match="kind='grammar'"):
        Constraint("grammar", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need a tokenizer"):
        OvisEngine.from_model(get_engine().model).generate([build_request()], constrain(DIGIT))


def test_greedy_rows_use_the_fast_sampler_again_once_constrained_rows_leave() -> None:
    greedy = SamplingParams(max_new_tokens=5)
    model = EngineCore(get_engine().model, tokenizer=TOKENIZER)
    letters = Constraint("regex", "[a-z]{30}")
    rows = model.enqueue([build_request()] * 2, [greedy, constrain(letters, temperature=0.0)])
    model.step()
    assert model.runner._sampler is not None
    assert not model.runner._sampler.is_greedy
    while not all(row.has_left for row in rows):
        model.step()
    model.enqueue([build_request()], [greedy])
    model.step()
    assert model.runner._sampler is not None
    assert model.runner._sampler.is_greedy
