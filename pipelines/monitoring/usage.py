"""Measure how busy the actors of a stage are, and add their readings up."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Reading:
    """What actors have done since their first call; several actors add up.

    ready_s: time since the first call. busy_s: the part of it with work in hand.
    waiting_s: the part of `busy_s` that waited for bytes of a store. full_s: the part with as many calls as it may run.
    peak_bytes: largest memory of a process. engine: totals of `Engine.measure`.
    """

    ready_s: float = 0.0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    full_s: float = 0.0
    rows: int = 0
    peak_bytes: int = 0
    engine: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Reading) -> Reading:
        engine = Counter(self.engine)
        engine.update(other.engine)
        return Reading(
            self.ready_s + other.ready_s,
            self.busy_s + other.busy_s,
            self.waiting_s + other.waiting_s,
            self.full_s + other.full_s,
            self.rows + other.rows,
            max(self.peak_bytes, other.peak_bytes),
            engine,
        )

    def __sub__(self, earlier: Reading) -> Reading:
        return Reading(
            self.ready_s - earlier.ready_s,
            self.busy_s - earlier.busy_s,
            self.waiting_s - earlier.waiting_s,
            self.full_s - earlier.full_s,
            self.rows - earlier.rows,
            self.peak_bytes,
            {name: value - earlier.engine.get(name, 0.0) for name, value in self.engine.items()},
        )


class Meter:
    """Measures one actor. Thread-safe; `max_calls` is the number of calls that it may run at the same time."""

    def __init__(self, max_calls: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_calls, self._clock, self._lock = max_calls, clock, threading.Lock()
        self._ready_s: float | None = None  # when the first call came
        self._seen_s = clock()
        self._busy_s = self._waiting_s = self._full_s = 0.0
        self._calls = self._rows = 0

    @contextmanager
    def work(self) -> Iterator[None]:
        """Count the time in the context as busy."""
        self._change_calls(1)
        try:
            yield
        finally:
            self._change_calls(-1)

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Count the time in the context as waiting for a store. Only one thread at a time may wait."""
        started_s = self._clock()
        try:
            yield
        finally:
            self._waiting_s += self._clock() - started_s

    def follow(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; count the time in which they are made as busy, but not that of the caller."""
        iterator = iter(items)
        while True:
            with self.work():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def count(self, rows: int) -> None:
        """Count finished rows."""
        with self._lock:
            self._rows += rows

    def read(self, engine: Mapping[str, float] | None = None) -> Reading:
        """Return what was measured so far, with the totals of the actor's engine if it has one."""
        with self._lock:
            now_s = self._advance()
            return Reading(
                0.0 if self._ready_s is None else now_s - self._ready_s,
                self._busy_s,
                self._waiting_s,
                self._full_s,
                self._rows,
                read_peak_bytes(),
                engine or {},
            )

    def _change_calls(self, number: int) -> None:
        with self._lock:
            now_s = self._advance()
            self._ready_s = now_s if self._ready_s is None else self._ready_s
            self._calls += number

    def _advance(self) -> float:
        now_s = self._clock()
        passed_s, self._seen_s = now_s - self._seen_s, now_s
        self._busy_s += passed_s * (self._calls > 0)
        self._full_s += passed_s * (self._calls >= self._max_calls)
        return now_s


def read_peak_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PoolReadings:
    """The last reading of each actor of a stage, to which those of its earlier processes are added."""

    def __init__(self) -> None:
        self._before: dict[str, Reading] = {}
        self._last: dict[str, Reading] = {}

    def restart(self, actor: str) -> None:
        """Keep what the actor's process has done, because a new one takes its place."""
        if last := self._last.pop(actor, None):
            self._before[actor] = self._before.get(actor, Reading()) + last

    def add(self, actor: str, reading: Reading) -> None:
        """Take the reading of an actor's process."""
        self._last[actor] = reading

    def read(self) -> dict[str, Reading]:
        """Return the reading of each actor, all its processes together."""
        nothing = Reading()
        actors = self._before.keys() | self._last.keys()
        return {actor: self._before.get(actor, nothing) + self._last.get(actor, nothing) for actor in sorted(actors)}
