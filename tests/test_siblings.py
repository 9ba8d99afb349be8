"""Tasks of one item give the same answers as alone, for one vision pass and one prefill of their shared prefix."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.kv_cache import Extend
from ovis_model.engine.prefix_sharing import find_prefixes
from ovis_model.engine.requests import RequestState
from ovis_model.engine.scheduler import Budget
from ovis_model.inputs.processor import Processor
from ovis_model.types import Request, RequestError, SamplingParams
from tests.support.engines import compute_logits, load_engine, make_golden_requests
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir
from tests.support.golden_items import CHOICE, CHOICES, END, TASKS, assert_same, generate_alone, make_items, make_params
from tests.support.replays import Recorded


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(("slots", "page_tokens"), [(1, 0), (5, 0), (64, 0), (5, 16)])
def test_eight_tasks_answer_as_eight_requests_with_one_vision_pass_per_item(
    checkpoint: str, slots: int, page_tokens: int
) -> None:
    budget = Budget(kv_tokens=400 * slots, slots=slots, page_tokens=page_tokens)
    engine = OvisEngine.from_model(load_engine(checkpoint).model, budget=budget)
    # The longest first, so that the cache need not grow: a row that waits for the larger cache finds no sibling in it.
    order = sorted(range(8), key=lambda item: -len(make_items(checkpoint)[item][0].input_ids))
    items = [make_items(checkpoint)[index] for index in order]
    requests = [request for item in items for request in item]
    found = engine.generate(requests, [make_params(task) for _ in items for task in range(len(TASKS))])
    for index, completion in enumerate(found):
        assert_same(completion, generate_alone(checkpoint, order[index // len(TASKS)], index % len(TASKS)))
    assert engine.stats.tiles == sum(len(item[0].tiles) for item in items)
    prefixes = Counter(prefix for item in items for prefix in find_prefixes(item))
    shared = sum(prefix.length * (num_rows - 1) for prefix, num_rows in prefixes.items())
    assert engine.stats.prompt_tokens == sum(len(request.input_ids) for request in requests) - shared


@settings(max_examples=60, deadline=None)
@given(data=st.data(), slots=st.integers(1, 16), replayed=st.booleans())
def test_tasks_of_items_that_arrive_at_any_time_do_not_affect_each_other(
    data: st.DataObject, slots: int, replayed: bool
) -> None:
    """This includes captured steps that cover unused slots, and running out of memory at any moment."""
    checkpoint = "tiny56-tied"
    items, options = make_items(checkpoint), {"make_step_runner": Recorded()} if replayed else {}
    budget = Budget(kv_tokens=230 * slots, slots=slots, page_tokens=data.draw(st.sampled_from([0, 16])))
    engine = EngineCore(load_engine(checkpoint).model, budget=budget, **options)
    tasks = st.lists(st.integers(0, len(TASKS) - 1), min_size=1, max_size=8)
    calls = data.draw(st.lists(st.lists(st.tuples(st.integers(0, 7), tasks), min_size=1, max_size=4), max_size=3))
    rows: list[tuple[RequestState, int, int]] = []
    for call in calls:
        picked = [(item, task) for item, own in call for task in own]
        random.Random(len(picked)).shuffle(picked)
        params = [make_params(task) for _, task in picked]
        enqueued = engine.enqueue([items[item][task] for item, task in picked], params)
        rows += [(row, *which) for row, which in zip(enqueued, picked, strict=True)]
        for _ in range(data.draw(st.integers(0, 5))):
            engine.step()
        if data.draw(st.booleans()) and not all(row.has_left for row, _, _ in rows):
            engine.shrink(torch.OutOfMemoryError("raised by the test"))
            engine.scheduler.budget = engine._budget
    while not all(row.has_left for row, _, _ in rows):
        engine.step()
    for row, item, task in rows:
        if row.error is None:  # with one slot, a row that runs out of memory fails
            assert_same(row.make_completion(), generate_alone(checkpoint, item, task))
        assert row.item.visual is None
    assert slots == 1 or not any(row.error for row, _, _ in rows)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_probabilities_of_choices_equal_those_of_scoring_each_alone(checkpoint: str) -> None:
    """The reference is `model.forward` over prompt and choice, without a cache."""
    model = load_engine(checkpoint).model
    choices = (*CHOICES, tuple(range(100, 140)))
    requests = [item[0] for item in make_items(checkpoint)]
    completions = load_engine(checkpoint).generate(requests, SamplingParams(choices=choices))
    for request, completion in zip(requests, completions, strict=True):
        logliks = torch.stack([compute_loglik(model, request, choice) for choice in choices])
        assert completion.choice_probs is not None and completion.choice_probs.dtype == np.float32
        np.testing.assert_allclose(completion.choice_probs, logliks.softmax(0), atol=1e-4, rtol=0)
        best = int(logliks.argmax())
        assert completion.output_ids.tolist() == list(choices[best])
        assert completion.finish_reason == "stop"
        assert completion.mean_logprob == pytest.approx(float(logliks[best]) / len(choices[best]), abs=1e-4)


def compute_loglik(model: torch.nn.Module, request: Request, choice: tuple[int, ...]) -> torch.Tensor:
    ids = np.concatenate([request.input_ids, np.array(choice, np.int32)])
    logprobs = compute_logits(model, replace(request, input_ids=ids)).log_softmax(-1)[len(request.input_ids) - 1 : -1]
    return logprobs.gather(1, torch.tensor(choice)[:, None]).sum()


def test_choices_are_sampled_at_a_temperature_with_the_seed_of_the_row() -> None:
    engine, request = load_engine("tiny56-tied"), make_items("tiny56-tied")[0][3]
    choices = ((17,), (9,), (301,), (22,))
    params = [SamplingParams(choices=choices, temperature=2.0, seed=seed) for seed in range(400)]
    found = engine.generate([request] * 400, params)
    probs = found[0].choice_probs
    assert probs is not None
    wanted = torch.from_numpy(probs).log().div(2).softmax(0)
    counts = Counter(completion.output_ids.tolist()[0] for completion in found)
    for (token,), share in zip(choices, wanted.tolist(), strict=True):
        assert counts[token] / 400 == pytest.approx(share, abs=0.08)
    again = engine.generate([request] * 2, params[7:9])
    assert [c.output_ids.tolist() for c in again] == [c.output_ids.tolist() for c in found[7:9]]


def test_a_choice_without_logprobs_still_has_probabilities() -> None:
    [completion] = load_engine("tiny56-tied").generate(
        [make_items("tiny56-tied")[0][0]], SamplingParams(choices=CHOICES, logprobs=False)
    )
    assert math.isnan(completion.mean_logprob) and completion.choice_probs is not None


def test_choices_that_exceed_one_pass_are_scored_the_same() -> None:
    checkpoint = "tiny56-tied"
    rng = random.Random(3)
    choices = tuple((*(rng.randrange(500) for _ in range(rng.randrange(1, 9))), END) for _ in range(150))
    params = SamplingParams(choices=choices)
    requests = make_items(checkpoint)[3][:3]
    budget = Budget(kv_tokens=1000, slots=2, prefill_tokens=64)
    small = OvisEngine.from_model(load_engine(checkpoint).model, budget=budget).generate(requests, params)
    for found, wanted in zip(small, load_engine(checkpoint).generate(requests, params), strict=True):
        assert_same(found, wanted)
        assert found.choice_probs is not None and float(found.choice_probs.sum()) == pytest.approx(1)


def test_samples_of_one_prompt_share_all_but_its_last_token() -> None:
    checkpoint = "tiny56-tied"
    engine, request = OvisEngine.from_model(load_engine(checkpoint).model), make_golden_requests(checkpoint)[0]
    params = [SamplingParams(max_new_tokens=6, temperature=2.0, seed=seed) for seed in range(8)]
    found = engine.generate([request] * 8, params)
    for completion, own in zip(found, params, strict=True):
        assert completion.output_ids.tolist() == engine.generate([request], own)[0].output_ids.tolist()
    assert len({tuple(completion.output_ids) for completion in found}) > 1
    assert engine.stats.prompt_tokens == len(request.input_ids) * (1 + 8) + 7


def test_running_out_of_memory_while_siblings_enter_only_costs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = "tiny56-tied"
    engine = OvisEngine.from_model(load_engine(checkpoint).model, budget=Budget(kv_tokens=4000, slots=8))
    extend = Extend.__init__

    def extend_at_most_two(self: Extend, cache: object, sources: torch.Tensor, *others: object) -> None:
        if len(sources) > 2:
            raise torch.OutOfMemoryError("too many rows")
        extend(self, cache, sources, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Extend, "__init__", extend_at_most_two)
    params = [replace(make_params(task), choices=TASKS[task][2].choices[:1]) for task in range(len(TASKS))]
    found = engine.generate(make_items(checkpoint)[0], params)
    for task, completion in enumerate(found):
        if not params[task].choices:
            assert_same(completion, generate_alone(checkpoint, 0, task))
    assert engine.backend.core.scheduler.budget.slots == 2


def test_a_row_that_fails_for_lack_of_memory_frees_its_visual_tokens() -> None:
    checkpoint = "tiny56-tied"
    engine = EngineCore(load_engine(checkpoint).model, budget=Budget(kv_tokens=400, slots=1))
    requests = [make_items(checkpoint)[item][0] for item in (0, 1)]
    first, second = engine.enqueue(requests, [SamplingParams(max_new_tokens=1)] * 2)
    engine.step()
    assert first.has_left and second.item.visual is not None  # its tiles were in the same pass
    engine.shrink(torch.OutOfMemoryError("raised by the test"))
    assert second.error is not None and second.item.visual is None


def test_siblings_share_their_common_prefix() -> None:
    tiles, sizes = np.zeros((1, 3, 2, 2), np.uint8), np.array([[2, 2]], np.int32)

    def make_request(*ids: int) -> Request:
        return Request(np.array(ids, np.int32), tiles.copy(), sizes.copy(), group="one picture")

    same = find_prefixes(
        [make_request(1, -301, -300, 5, 6), make_request(1, -301, -300, 5, 7), make_request(1, -301, -300, 5, 6)]
    )
    assert same[0] is same[1] is same[2] and same[0].length == 4
    one, other, third = find_prefixes([make_request(1, -300, 5), make_request(2, -300, 5), make_request(1, -300, 5, 9)])
    assert one is third and one is not other and one.item is other.item
    assert (one.length, other.length) == (2, 2)
    whole, _ = find_prefixes([make_request(1, -300), make_request(1, -300)])
    assert whole.length == 0  # the last token, which is not shared, is a placeholder
    for group in (None, "another"):
        other = replace(make_request(1, -300, 5), group=group)
        assert len({prefix.item for prefix in find_prefixes([make_request(1, -300, 5), other, make_request(1)])}) == 2
    apart = replace(make_request(1, -300, 5), group=None)
    assert len({prefix.item for prefix in find_prefixes([apart, apart])}) == 2


def test_a_group_with_different_images_is_refused_by_name() -> None:
    first = make_items("tiny56-tied")[0][0]
    for other in (
        replace(first, tiles=np.where(first.tiles == 0, 1, first.tiles).astype(np.uint8)),
        replace(first, tile_sizes=first.tile_sizes - 1),
        replace(make_items("tiny56-tied")[-1][0], group=first.group),
    ):
        broken = [replace(request, group="dog.jpg") for request in (first, first, other)]
        with pytest.raises(ValueError, match=r"request 2 differs in its images from .* group 'dog.jpg'"):
            load_engine("tiny56-tied").generate(broken, CHOICE)


def test_an_unpickled_group_shares_its_prefix_and_its_tiles() -> None:
    """Ranks receive requests by pickle."""
    requests = Processor.from_pretrained(str(checkpoint_dir("tiny56-tied"))).build_requests([[1, 2], [1, 3]], [])
    there = pickle.loads(pickle.dumps([*requests, *requests]))
    assert len({prefix.item for prefix in find_prefixes(there)}) == 1
    assert there[0].tiles is there[1].tiles


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="must be non-empty"):
        SamplingParams(choices=((5,), ()))
    engine, request = load_engine("tiny56-tied"), make_golden_requests("tiny56-tied")[0]
    with pytest.raises(RequestError, match="request 0: a choice contains token 640; the model has 640"):
        engine.generate([request], SamplingParams(choices=((5, 640),)))
    long = SamplingParams(choices=(tuple([5] * 40_000),))
    with pytest.raises(RequestError, match=r"40000 output tokens are .* over the limit of 32768"):
        engine.generate([request], long)
    small = OvisEngine.from_model(engine.model, budget=Budget(kv_tokens=4000, prompt_tokens=100))
    with pytest.raises(
        RequestError, match=r"prompt and choice tokens are .* over the 100 that fit in the device's memory"
    ):
        small.generate([request], SamplingParams(choices=((5,) * 90,)))
    ends = replace(request, input_ids=request.input_ids[: np.flatnonzero(request.input_ids == -300)[-1] + 1])
    with pytest.raises(RequestError, match="the prompt ends within an image"):
        engine.generate([ends], CHOICE)
