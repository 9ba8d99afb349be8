"""Decode steps from captured graphs: buckets, padding and buffers; on a CPU the capture calls the step again."""

from __future__ import annotations

import itertools
import random
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovis_model.engine.decode_step import BatchStepper, CudaGraphs, Decoded, round_up_length, round_up_rows
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.kv_cache import KVCache
from ovis_model.engine.sampling import choose_greedily
from ovis_model.engine.scheduler import Budget
from ovis_model.network.attention import Varlen
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
from tests.support.varlen import varlen_attn_2_12

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
    assert engine.stats.steps > 3 * len(runner.shapes)
    assert len(runner.shapes) <= 11


def test_warming_up_captures_every_bucket_of_rows() -> None:
    make = Recorded()
    budget = Budget(kv_tokens=20_000, slots=20, slot_tokens=1000)  # the whole cache is allocated at once, as on CUDA
    engine = OvisEngine.from_model(load_engine(CHECKPOINT).model, budget=budget, make_step_runner=make)
    engine.warm_up()
    [runner] = make.made
    assert [rows for rows, _ in runner.shapes] == [20, 16, 8, 4, 2, 1]
    assert engine.stats.steps == 0
    before = list(runner.shapes)
    assert generate_ids(engine, make_golden_requests(CHECKPOINT)) == load_greedy_ids(CHECKPOINT)
    assert make.made == [runner] and list(runner.shapes) == before


@pytest.mark.parametrize("page_tokens", [0, 16])
def test_answers_that_end_at_once_leave_no_bucket_uncaptured(page_tokens: int) -> None:
    """Every token is an end-of-text id, as a blank image may make it; warming up ignores that."""
    make = Recorded()
    budget = Budget(kv_tokens=20_000, slots=20, slot_tokens=1000, page_tokens=page_tokens)
    model = load_engine(CHECKPOINT).model
    every_id = range(model.config.language.vocab_size)
    engine = OvisEngine.from_model(model, budget=budget, make_step_runner=make, eos_token_ids=every_id)
    engine.warm_up()
    [runner] = make.made
    assert [rows for rows, _ in runner.shapes] == [20, 16, 8, 4, 2, 1]
    assert {len(ids) for ids in generate_ids(engine, make_golden_requests(CHECKPOINT))} == {1}


def test_warming_up_runs_in_the_thread_that_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's libraries keep plans and workspaces per thread."""
    threads = set()
    step = EngineCore.step

    def record(core: EngineCore) -> None:
        threads.add(threading.current_thread())
        step(core)

    monkeypatch.setattr(EngineCore, "step", record)
    engine = OvisEngine.from_model(load_engine(CHECKPOINT).model, budget=Budget(kv_tokens=2000, slots=4))
    engine.warm_up()
    generate_ids(engine, make_golden_requests(CHECKPOINT)[:2])
    assert [thread.name for thread in threads] == ["engine"]


@settings(max_examples=10, deadline=None)
@given(data=st.data(), slots=st.integers(1, 16))
def test_pages_change_no_answer(data: st.DataObject, slots: int) -> None:
    """Long and short rows share the pages; buckets are padded with rows that do not exist."""
    picked = data.draw(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(sorted(PARAMS))), min_size=1, max_size=20))
    budget = Budget(kv_tokens=data.draw(st.sampled_from([208, 800])), slots=slots, page_tokens=16)
    engine = OvisEngine.from_model(load_engine(CHECKPOINT).model, budget=budget, make_step_runner=Recorded())
    requests = make_golden_requests(CHECKPOINT)
    params = [replace(PARAMS[kind], max_new_tokens=1 + n % 12) for n, (_, kind) in enumerate(picked)]
    found = engine.generate([requests[i] for i, _ in picked], params)
    for completion, (index, kind), own in zip(found, picked, params, strict=True):
        assert completion.output_ids.tolist() == generate_alone(index, kind)[: own.max_new_tokens]


def test_kernels_that_read_pages_generate_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernel is written out; it gets the cache and the table as on CUDA."""
    kernels = Varlen(partial(varlen_attn_2_12, enable_gqa=True), reads_pages=True)
    monkeypatch.setattr("ovis_model.engine.kv_cache.choose_kernels", lambda like: kernels)
    make = Recorded()
    budget = Budget(kv_tokens=960, slots=5, page_tokens=32)
    engine = OvisEngine.from_model(load_engine(CHECKPOINT).model, budget=budget, make_step_runner=make)
    requests, wanted = make_golden_requests(CHECKPOINT), load_greedy_ids(CHECKPOINT)
    assert generate_ids(engine, requests) == wanted
    assert len({longest for _, longest in make.made[0].shapes}) == 1  # lengths are read, not masked


class FakeCuda:
    """CUDA's streams and graphs on a CPU: counts them, and runs the work of a graph only when it is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[Any] = []
        self.captured_on: list[Any] = []
        self.pools: list[Any] = []
        for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self) -> Any:  # noqa: N802
        self.streams.append(self.current_stream())
        return self.streams[-1]

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda stream: None)

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: None)

    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        self.captured_on.append(stream)
        self.pools.append(pool)
        return nullcontext()


def test_all_graphs_share_one_stream_and_one_buffer_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of its own would keep a workspace of 32 MB per graph, and logits of its own 2 to 39 MB."""
    cuda, graphs = FakeCuda(monkeypatch), CudaGraphs()
    cache: Any = SimpleNamespace(slots=20, capacity=64, attention_reads_lengths=True)
    alive: list[weakref.ref[Any]] = []

    def step(rows: int, longest: int) -> Decoded:
        logits = torch.zeros(rows, 1000)
        alive.append(weakref.ref(logits))
        return Decoded(logits, choose_greedily(logits))

    results = [graphs(step, rows, 1, cache) for rows in (20, 16, 8, 4, 2, 1)]
    assert len(graphs.shapes) == 6 and len(cuda.streams) == 1
    assert cuda.captured_on == [cuda.streams[0]] * 6 and cuda.pools == [None] + ["pool"] * 5
    assert {result.logits.data_ptr() for result in results} == {results[0].logits.data_ptr()}
    assert results[0].logits.shape == (20, 1000)
    assert all(ref() is None for ref in alive)  # no graph keeps its own


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
