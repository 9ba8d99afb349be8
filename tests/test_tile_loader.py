"""Tiles reach the device whole and in order, through two buffers whose copies are as late as a GPU may make them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ovis_model.engine.clock import DeviceClock
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.prefix_sharing import Item
from ovis_model.engine.scheduler import Budget
from ovis_model.engine.tile_loader import DirectLoader, StagedLoader, split_into_passes
from tests.support.engines import GREEDY, generate_ids, load_engine, load_greedy_ids, make_golden_requests
from tests.support.golden_data import checkpoint_dir

CHECKPOINT = "tiny56-tied"
TILE = (3, 2, 2)
NUM_BYTES = 4 * 12  # of the tiles of a pass


class LateCopies:
    """A stream whose copies are done in order, but only when something waits for one of them."""

    def __init__(self) -> None:
        self._queued: deque[tuple[Tensor, Tensor, int]] = deque()
        self.allocated: list[int] = []
        self.num_sent = self.num_done = self.host_waits = 0

    def allocate(self, num_bytes: int) -> Tensor:
        self.allocated.append(num_bytes)
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def send(self, source: Tensor) -> tuple[Tensor, Any]:
        target = torch.full_like(source, 255)
        self.num_sent += 1
        self._queued.append((source, target, self.num_sent))
        return target, Event(self, self.num_sent)

    def receive(self, tensors: Sequence[Tensor], event: Any) -> None:
        self.finish(event.number)

    def mark(self) -> Any:
        return Event(self, 0)

    def finish(self, number: int) -> None:
        while self._queued and self._queued[0][2] <= number:
            source, target, self.num_done = self._queued.popleft()
            target.copy_(source)


class Event:
    def __init__(self, copies: LateCopies, number: int) -> None:
        self.copies, self.number = copies, number

    def synchronize(self) -> None:
        self.copies.host_waits += self.number > self.copies.num_done
        self.copies.finish(self.number)


def make_items(counts: Sequence[int], seed: int = 0) -> list[Item]:
    rng = np.random.default_rng(seed)
    return [Item(rng.integers(0, 255, (n, *TILE), np.uint8), rng.integers(1, 3, (n, 2), np.int32)) for n in counts]


def load_all(loader: Any, items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor]]:
    for pieces in split_into_passes(items, 4):
        assert sum(stop - start for _, start, stop in pieces) <= 4
        yield loader.load(pieces)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 9), max_size=8), data=st.data())
def test_all_tiles_arrive_whatever_was_sent_ahead(counts: list[int], data: st.DataObject) -> None:
    items, ahead = make_items(counts), data.draw(st.lists(st.integers(0, 7), max_size=3, unique=True))
    copies = LateCopies()
    staged = StagedLoader(copies, NUM_BYTES)
    for index in ahead:
        staged.send_ahead([item for item in items[index : index + 1] if len(item.tiles) <= 4])
    found = list(load_all(staged, items))
    wanted = list(load_all(DirectLoader(torch.device("cpu")), items))
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert len(copies.allocated) <= 2 or max(counts) > 4


def test_two_buffers_are_used_in_turn_and_refilled_after_their_copies() -> None:
    copies = LateCopies()
    loader = StagedLoader(copies, 8 * NUM_BYTES)
    items = make_items([1] * 5)
    for number, item in enumerate(items):
        loader.send_ahead([item])
        assert copies.num_done == max(0, number - 1)  # the third send waits for the first copy
    assert len(copies.allocated) == 2 and copies.host_waits == 3
    loader.send_ahead(items)
    assert copies.num_sent == 5  # nothing is sent twice


def test_staged_tiles_change_no_answer() -> None:
    core = EngineCore(load_engine(CHECKPOINT).model, budget=Budget(kv_tokens=900, slots=3, vision_tiles=10))
    core.runner.tiles = StagedLoader(LateCopies(), 10 * 3 * 56**2)
    requests = make_golden_requests(CHECKPOINT) * 3
    sent_ahead = record_sends(core)
    states = core.enqueue(requests, [GREEDY] * len(requests))
    while not all(state.has_left for state in states):
        core.step()
    assert [state.output_ids for state in states] == load_greedy_ids(CHECKPOINT) * 3
    assert any(sent_ahead) and all(state.item.sent is None for state in states)


def record_sends(core: EngineCore) -> list[int]:
    counts, send = [], core.runner.tiles.send_ahead

    def record(items: Sequence[Item]) -> None:
        counts.append(sum(len(item.tiles) for item in items if item.sent is None))
        send(items)

    core.runner.tiles.send_ahead = record  # type: ignore[method-assign]
    return counts


class TimedEvent:
    """An event of a device that has passed `passed_s` of its work."""

    passed_s = recorded_s = 0.0
    host_waits = 0

    def record(self) -> None:
        TimedEvent.recorded_s += 2.0
        self.at_s = TimedEvent.recorded_s

    def query(self) -> bool:
        return self.at_s <= TimedEvent.passed_s

    def synchronize(self) -> None:
        TimedEvent.host_waits += not self.query()
        TimedEvent.passed_s = max(TimedEvent.passed_s, self.at_s)

    def elapsed_time(self, end: TimedEvent) -> float:
        assert self.query() and end.query(), "the device has not passed the events"
        return (end.at_s - self.at_s) * 1e3


def test_events_are_read_once_they_have_passed() -> None:
    clock = DeviceClock(TimedEvent)
    for name in ("vision_s", "prefill_s"):
        with clock.measure(name):
            pass
    assert list(clock.collect(wait=False)) == [] and TimedEvent.host_waits == 0
    TimedEvent.passed_s = 4.0  # both events of the first part
    assert list(clock.collect(wait=False)) == [("vision_s", 2.0)] and TimedEvent.host_waits == 0
    assert list(clock.collect(wait=True)) == [("prefill_s", 2.0)] and TimedEvent.host_waits == 1
    assert list(clock.collect(wait=True)) == []


def test_the_times_of_all_steps_are_counted_when_no_work_is_left() -> None:
    core = EngineCore(load_engine(CHECKPOINT).model, budget=Budget(kv_tokens=900, slots=4))
    core._clock = DeviceClock(TimedEvent)
    requests = make_golden_requests(CHECKPOINT)
    states = core.enqueue(requests, [GREEDY] * len(requests))
    while not all(state.has_left for state in states):
        waits = TimedEvent.host_waits
        core.step()
        assert TimedEvent.host_waits == waits or all(state.has_left for state in states)
    assert core.stats.decode_s == 2.0 * core.stats.steps
    assert core.stats.prefill_s == core.stats.vision_s > 0


@pytest.mark.gpu
def test_staged_tiles_arrive_on_cuda() -> None:
    engine = OvisEngine.from_pretrained(str(checkpoint_dir(CHECKPOINT)), device="cuda", dtype="float32")
    staged = OvisEngine.from_model(engine.model, budget=Budget(kv_tokens=900, slots=4, vision_tiles=4))
    for _ in range(3):
        assert generate_ids(staged, make_golden_requests(CHECKPOINT)) == load_greedy_ids(CHECKPOINT)
    assert 0 < staged.stats.vision_s < 60
