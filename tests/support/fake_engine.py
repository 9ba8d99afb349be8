"""A fake engine to test the pipeline: one token and a fixed time per row, failures on request."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovis_model.types import Completion, EngineDied, Request, RequestError, SamplingParams
from pipelines.generate import Replica


@dataclass(frozen=True)
class FakeEngineFactory:
    """Makes a FakeEngine.

    Each call appends a line "start_s stop_s rows" to `busy_log`. Rows of `fails_on_tiles` tiles are refused; rows of
    `dies_on_tiles` tiles raise EngineDied; rows of `kills_on_tiles` tiles kill the process.
    """

    seconds_per_row: float = 0.0
    busy_log: Path | None = None
    fails_on_tiles: int | None = None
    dies_on_tiles: int | None = None
    kills_on_tiles: int | None = None

    def __call__(self, replica: Replica) -> FakeEngine:
        return FakeEngine(self)


class FakeEngine:
    def __init__(self, factory: FakeEngineFactory) -> None:
        self._factory = factory
        self._lock = threading.Lock()  # one device: calls take turns

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        for request in requests:
            if len(request.tiles) == self._factory.fails_on_tiles:
                raise RequestError(f"{len(request.tiles)} tiles are an unlucky number")
            if len(request.tiles) == self._factory.dies_on_tiles:
                raise EngineDied("a cosmic ray")
            if len(request.tiles) == self._factory.kills_on_tiles:
                os.kill(os.getpid(), signal.SIGKILL)
        with self._lock:
            start_s = time.time()
            time.sleep(self._factory.seconds_per_row * len(requests))
            self._log(start_s, len(requests))
        return [Completion(np.array([len(r.tiles)], np.int32), "stop", -0.5) for r in requests]

    def rebuild(self) -> bool:
        return False

    def measure(self) -> dict[str, float]:
        return {}

    def _log(self, start_s: float, rows: int) -> None:
        if self._factory.busy_log is not None:
            line = f"{start_s} {time.time()} {rows}\n".encode()
            log = os.open(self._factory.busy_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, line)
            os.close(log)
