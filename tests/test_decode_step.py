"""Decode steps from captured graphs: buckets, padding and buffers; on a CPU the capture calls the step again."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovis_model.engine.decode_step import BatchStepper, round_up_length, round_up_rows
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.kv_cache import KVCache
from ovis_model.engine.scheduler import Budget
from tests.support.engines import (
    GREEDY,
    PARAMS,
    generate_alone,
    generate_ids,
    load_engine,
    load_greedy_ids,
    make_golden_requests,
)
from tests.support.golden_data import checkpoint_dir
from tests.support.replays import Recorded

CHECKPOINT = "tiny56-tied"


@settings(max_examples=15, deadline=None)
@given(data=st.data(), slots=st.integers(1, 16))
def test_replayed_steps_generate_what_each_request_generates_alone(data: st.DataObject, slots: int) -> None:
    """Greedy and sampled rows enter and leave; buckets are padded with rows that do not exist."""
    picked = data.draw(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(sorted(PARAMS))), min_size=1, max_size=20))
    make = Recorded()
    engine = OvisEngine.from_model(
        load_engine(CHECKPOINT).model, budget=Budget(kv_tokens=200 * slots, slots=slots), make_step_runner=make
    )
    requests = make_golden_requests(CHECKPOINT)
    params = [replace(PARAMS[kind], max_new_tokens=1 + n % 12) for n, (_, kind) in enumerate(picked)]
    found = engine.generate([requests[i] for i, _ in picked], params)
    for completion, (index, kind), own in zip(found, picked, params, strict=True):
        assert completion.output_ids.tolist() == generate_alone(index, kind)[: own.max_new_tokens]


def test_at_most_eleven_graphs_cover_all_steps() -> None:
    make = Recorded()
    budget = Budget(kv_tokens=12_800, slots=64)
    engine = OvisEngine.from_model(load_engine(CHECKPOINT).model, budget=budget, make_step_runner=make)
    requests, wanted = make_golden_requests(CHECKPOINT), load_greedy_ids(CHECKPOINT)
    order = random.Random(3).choices(range(len(requests)), k=200)
    assert generate_ids(engine, [requests[i] for i in order]) == [wanted[i] for i in order]
    [runner] = make.made
    assert engine.stats.steps > 3 * len(runner._replays)
    assert len(runner._replays) <= 11


def test_warming_up_captures_every_bucket_of_rows() -> None:
    make = Recorded()
    budget = Budget(kv_tokens=20_000, slots=20, slot_tokens=1000)  # the whole cache is allocated at once, as on CUDA
    engine = OvisEngine.from_model(
        load_engine(CHECKPOINT).model, budget=budget, make_step_runner=make, eos_token_ids=()
    )
    engine.warm_up()
    [runner] = make.made
    assert [rows for rows, _ in runner._replays] == [20, 16, 8, 4, 2, 1]
    assert engine.stats.steps == 0
    before = list(runner._replays)
    for found, wanted in zip(
        generate_ids(engine, make_golden_requests(CHECKPOINT)), load_greedy_ids(CHECKPOINT), strict=True
    ):
        assert found[: len(wanted)] == wanted  # longer, as end-of-text ids do not end it
    assert make.made == [runner] and list(runner._replays) == before


@given(st.integers(1, 64), st.integers(1, 64))
def test_buckets_of_rows_have_at_most_seven_to_spare(rows: int, slots: int) -> None:
    rows = min(rows, slots)
    bucket = round_up_rows(rows, slots)
    assert rows <= bucket <= slots
    assert bucket - rows <= 7 and (rows > 8 or bucket < 2 * rows)
    assert round_up_rows(bucket, slots) == bucket


def test_lengths_round_up_to_buckets_within_the_capacity() -> None:
    cache: Any = SimpleNamespace(capacity=1300, attention_reads_lengths=False)
    assert [round_up_length(n, cache) for n in (1, 512, 513, 1025, 1299)] == [512, 512, 1024, 1299, 1299]
    cache.attention_reads_lengths = True
    assert round_up_length(1, cache) == 1299


def test_state_stays_in_place_and_needs_the_host_only_when_rows_change() -> None:
    model = load_engine(CHECKPOINT).model
    cache = KVCache(model.config.language, slots=4, capacity=64, device=model.device, dtype=model.dtype)
    stepper = BatchStepper(model, cache)
    at = stepper._state.data_ptr()
    with torch.inference_mode():
        stepper.load([5, 6], [3, 7])
        assert stepper._state.tolist() == [[5, 6, 0, 0], [3, 7, 0, 0]]
        stepper.advance(torch.tensor([8, 9]))
        assert stepper._state.tolist() == [[8, 9, 0, 0], [4, 8, 0, 0]]
        stepper.load([1], [2])
    assert stepper._state.tolist() == [[1, 0, 0, 0], [2, 0, 0, 0]]
    assert stepper._state.data_ptr() == at


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_on_the_device_generate_what_eager_steps_do(dtype: Any) -> None:
    """Rows enter and leave; in float32 the ids also equal the original's."""
    from ovis_model.engine.decode_step import run_eagerly

    engine = OvisEngine.from_pretrained(str(checkpoint_dir(CHECKPOINT)), device="cuda", dtype=dtype)
    budget = Budget(kv_tokens=1600, slots=8)
    eager = OvisEngine.from_model(engine.model, budget=budget, make_step_runner=lambda: run_eagerly)
    graphs = OvisEngine.from_model(engine.model, budget=budget)
    requests = list(itertools.islice(itertools.cycle(make_golden_requests(CHECKPOINT)), 30))
    if dtype == "float32":
        assert generate_ids(graphs, requests) == generate_ids(eager, requests) == (load_greedy_ids(CHECKPOINT) * 4)[:30]
    else:
        pairs = zip(generate_ids(graphs, requests), generate_ids(eager, requests), strict=True)
        assert sum(a == b for a, b in pairs) >= 24  # kernels of other shapes may break ties differently
    assert generate_ids(graphs, requests[:3], GREEDY) == generate_ids(graphs, requests[:3], GREEDY)
