"""The engine loop over a fake core: concurrent calls, faults, interrupts, and the end of its thread."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ovis_model.config import SIZES
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_loop import LoopThread
from ovis_model.engine.requests import RequestState, make_states
from ovis_model.types import Completion, EngineDied, Request, RequestError, SamplingParams
from tests.support.roots import ROOT


class FakeCore:
    """A core that finishes a request after `max_new_tokens` steps, and refuses prompts that contain id 13."""

    model = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, before_step: Callable[[FakeCore], None] = lambda core: None) -> None:
        self.before_step = before_step
        self.states: list[RequestState] = []
        self.batch_sizes: list[int] = []

    def agree_on_arrivals(self, num_arrived: int) -> int:
        return num_arrived

    def enqueue(self, requests: Sequence[Request], params: Sequence[SamplingParams]) -> list[RequestState]:
        if any(13 in request.input_ids for request in requests):
            raise RequestError("request 0: 13 is an unlucky number")
        states = make_states(requests, params)
        self.states += states
        return states

    def step(self) -> None:
        self.before_step(self)
        self.states = [state for state in self.states if not state.has_left]
        self.batch_sizes.append(len(self.states))
        for state in self.states:
            state.append(7, -1.0)
            state.finish_reason = "length" if len(state.output_ids) == state.params.max_new_tokens else None

    def abandon(self) -> None:
        for state in self.states:
            state.error = RequestError("interrupted")


def make_engine(core: FakeCore) -> OvisEngine:
    return OvisEngine(SIZES["1B"], LoopThread(core))  # type: ignore[arg-type]


def make_request(*ids: int) -> Request:
    return Request(np.array(ids, np.int32), np.zeros((0, 3, 2, 2), np.uint8), np.zeros((0, 2), np.int32))


def generate(engine: OvisEngine, num_tokens: int = 3) -> list[Completion]:
    return engine.generate([make_request(1)], SamplingParams(max_new_tokens=num_tokens))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def wait_for_requests(count: int) -> Callable[[FakeCore], None]:
    """Return a hook that delays every step until `count` requests have been there at the same time."""
    seen: list[bool] = []

    def hold(core: FakeCore) -> None:
        if len(core.states) >= count:
            seen.append(True)
        if not seen:
            time.sleep(0.01)

    return hold


def test_requests_of_several_threads_run_in_the_same_steps(pool: ThreadPoolExecutor) -> None:
    core = FakeCore(wait_for_requests(4))
    engine = make_engine(core)
    calls = [pool.submit(generate, engine, 500 + n) for n in range(4)]
    assert [len(call.result(60)[0].output_ids) for call in calls] == [500, 501, 502, 503]
    assert max(core.batch_sizes) == 4


def test_a_call_returns_when_its_own_requests_finish(pool: ThreadPoolExecutor) -> None:
    core = FakeCore(lambda core: time.sleep(0.001))
    engine = make_engine(core)
    long = pool.submit(generate, engine, 10**6)
    assert len(generate(engine, 3)[0].output_ids) == 3
    assert not long.done()
    engine.close()
    with pytest.raises(EngineDied, match="the engine is closed"):
        long.result(10)


@pytest.mark.parametrize(
    ("ids", "params", "error"),
    [((13,), SamplingParams(), RequestError), ((1,), [None], AttributeError)],
    ids=["refused", "no parameters"],
)
def test_a_refused_call_leaves_other_calls_alone(
    pool: ThreadPoolExecutor, ids: tuple[int, ...], params: Any, error: type[Exception]
) -> None:
    engine = make_engine(FakeCore(lambda core: time.sleep(0.001)))
    other = pool.submit(generate, engine, 300)
    for _ in range(10):
        with pytest.raises(error):
            engine.generate([make_request(*ids)], params)
    assert len(other.result(60)[0].output_ids) == 300


def test_a_lost_device_fails_all_callers_now_and_later(pool: ThreadPoolExecutor) -> None:
    def fail(core: FakeCore) -> None:
        if len(core.states) >= 3:
            raise EngineDied("a cosmic ray")

    engine = make_engine(FakeCore(fail))
    calls: list[Future[list[Completion]]] = [pool.submit(generate, engine, 10**9) for _ in range(3)]
    for call in calls:
        with pytest.raises(EngineDied, match="a cosmic ray"):
            call.result(60)
    with pytest.raises(EngineDied, match="a cosmic ray"):
        generate(engine)
    assert engine.rebuild() is False
    engine.close()
    with pytest.raises(EngineDied, match="a cosmic ray"):
        generate(engine)


def test_an_interrupt_abandons_all_requests_and_the_engine_stays_usable(pool: ThreadPoolExecutor) -> None:
    engine = make_engine(FakeCore(lambda core: time.sleep(0.001)))
    other = pool.submit(generate, engine, 10**6)
    main = threading.main_thread().ident
    threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        generate(engine, 10**6)
    with pytest.raises(RequestError, match="interrupted"):
        other.result(10)
    assert len(generate(engine)[0].output_ids) == 3


def test_a_closed_engine_has_no_thread_and_refuses_calls() -> None:
    engine = make_engine(FakeCore())
    thread = get_thread(engine)
    assert thread.is_alive()
    engine.close()
    engine.close()
    assert not thread.is_alive()
    with pytest.raises(EngineDied, match="the engine is closed"):
        generate(engine)


def test_an_unreferenced_engine_frees_its_thread_and_model() -> None:
    core = FakeCore()
    with_cycle: list[Any] = [make_engine(core)]
    with_cycle.append(with_cycle)
    thread, core_reference = get_thread(with_cycle[0]), weakref.ref(core)
    generate(with_cycle[0])
    del with_cycle, core
    gc.collect()
    thread.join(10)
    gc.collect()
    assert not thread.is_alive() and core_reference() is None


def test_an_idle_engine_uses_no_cpu() -> None:
    engine = make_engine(FakeCore())
    generate(engine)
    started_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - started_s < 0.1
    engine.close()


def test_python_exits_cleanly_while_the_engine_works() -> None:
    """The loop ends after its current step, and the process does not abort."""
    program = (
        "import threading, time\n"
        "from tests.support.engines import GREEDY, load_engine, make_golden_requests\n"
        "engine, requests = load_engine('tiny56-tied'), make_golden_requests('tiny56-tied')\n"
        "def work():\n"
        "    while True: engine.generate(requests, GREEDY)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def get_thread(engine: OvisEngine) -> threading.Thread:
    assert isinstance(engine.backend, LoopThread)
    return engine.backend._thread
