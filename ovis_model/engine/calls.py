"""Pass messages from callers to the engine loop, and wait for their outcomes. Knows no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from itertools import count
from pathlib import Path
from typing import Literal, TypeVar

from ovis_model.config import Quantization
from ovis_model.types import Completion, Request, SamplingParams

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What to load. `num_threads`: CPU threads of the whole replica; None uses torch's default."""

    directory: Path
    device: Device = "auto"
    dtype: Dtype = "auto"
    post_trunk_norm: bool = False
    num_threads: int | None = None
    quantization: Quantization = "none"


@dataclass(frozen=True)
class Call:
    """A message to generate completions."""

    number: int
    requests: Sequence[Request]
    params: Sequence[SamplingParams]


@dataclass(frozen=True)
class WarmUp:
    """A message to generate the largest batch that fits on the device; its outcome is an empty list."""

    number: int


@dataclass(frozen=True)
class Abandon:
    """A message to fail all requests so far, because their caller was interrupted."""


@dataclass(frozen=True)
class Close:
    """A message to end the loop."""


Message = Call | WarmUp | Abandon | Close
Outcome = list[Completion] | Exception


@dataclass
class Stats:
    """Totals of all work so far.

    `sequence_steps` sums the sequences of all decode steps, `slot_steps` the slots that were available to them.
    """

    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tiles: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    sequence_steps: int = 0
    slot_steps: int = 0

    def __sub__(self, earlier: Stats) -> Stats:
        return Stats(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


class Calls:
    """Calls that wait for their outcomes. Any thread may make a call, and any thread may settle it."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        """Use `send` to pass a message to the loop; only one thread at a time calls it."""
        self._send = send
        self._lock = threading.Lock()
        self._numbers = count()
        self._futures: dict[int, Future[list[Completion]]] = {}
        self.fault: Exception | None = None
        self.busy_since_s = 0.0  # monotonic clock; valid while calls are waiting

    @property
    def is_busy(self) -> bool:
        """Whether any call waits for its outcome."""
        return bool(self._futures)

    def generate(self, requests: Sequence[Request], params: Sequence[SamplingParams]) -> list[Completion]:
        """Return the completions once they are generated. Raise the exception that ended the call or the engine."""
        return self._make(lambda number: Call(number, requests, params))

    def warm_up(self) -> None:
        """Return once the largest batch has been generated."""
        self._make(WarmUp)

    def settle(self, number: int, outcome: Outcome) -> None:
        """End the call `number` with its outcome; ignore calls that have ended."""
        with self._lock:
            future = self._futures.pop(number, None)
        if future is not None:
            settle(future, outcome)

    def fail(self, fault: Exception, clean_up: Callable[[], None] = lambda: None) -> None:
        """End all present and later calls with `fault`, or with that of an earlier failure.

        `clean_up` runs before the waiting callers continue.
        """
        with self._lock:
            self.fault = self.fault or fault
            futures = list(self._futures.values())
            self._futures.clear()
        clean_up()
        for future in futures:
            settle(future, self.fault)

    def _make(self, message: Callable[[int], Message]) -> list[Completion]:
        future: Future[list[Completion]] = Future()
        with self._lock:
            if self.fault is not None:
                raise self.fault
            self.busy_since_s = self.busy_since_s if self._futures else time.monotonic()
            number = next(self._numbers)
            self._futures[number] = future
            self._send(message(number))
        try:
            return future.result()
        except KeyboardInterrupt:
            with self._lock:
                self._send(Abandon())
            raise


def settle(future: Future[T], outcome: T | Exception) -> None:
    """Set the future's exception or result, unless it is done."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
