"""Measure how long the parts of a step take, without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """A stopwatch for parts with names."""

    def measure(self, name: str) -> Any:
        """Return a context whose duration counts for `name`."""
        ...

    def collect(self, *, wait: bool) -> Iterator[tuple[str, float]]:
        """Yield names and seconds that have become known since the last call; with `wait`, those of all contexts."""
        ...


def make_clock(device: torch.device) -> Clock:
    """Return the clock for work on `device`."""
    return DeviceClock(partial(torch.cuda.Event, enable_timing=True)) if device.type == "cuda" else HostClock()


class HostClock:
    """The time of the host, for devices that it waits for anyway."""

    def __init__(self) -> None:
        self._measured: deque[tuple[str, float]] = deque()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure with the host's clock."""
        started_s = perf_counter()
        yield
        self._measured.append((name, perf_counter() - started_s))

    def collect(self, *, wait: bool) -> Iterator[tuple[str, float]]:
        """Yield all that was measured."""
        while self._measured:
            yield self._measured.popleft()


class DeviceClock:
    """The time of a CUDA stream, between two events around the work that a context queues.

    The events are read once they have passed, so the host does not wait for them.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        """Take a function that makes an event which records the time."""
        self._make_event = make_event
        self._pending: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Record an event before and one after the context on the current stream."""
        start, end = self._make_event(), self._make_event()
        start.record()
        yield
        end.record()
        self._pending.append((name, start, end))

    def collect(self, *, wait: bool) -> Iterator[tuple[str, float]]:
        """Yield what the device has passed, in order; with `wait`, wait until it has passed all."""
        while self._pending and (wait or self._pending[0][2].query()):
            name, start, end = self._pending.popleft()
            end.synchronize()
            yield name, start.elapsed_time(end) / 1e3
