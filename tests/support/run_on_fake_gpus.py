"""Run captioning with replicas that reserve fake GPUs in Ray and compute on CPUs.

Usage: python -m tests.support.run_on_fake_gpus '{"input": [...], "output": ..., ...}' LOG
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cli import run_job
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.rank_pool import RankPool
from ovis_model.types import Completion, Engine, Request, SamplingParams
from pipelines.config import CaptionConfig
from pipelines.generate import Replica
from pipelines.pipeline import run_pipeline
from tests.support.fake_engine import FakeEngine, FakeEngineFactory


@dataclass(frozen=True)
class OnCpus:
    """Makes engines that run on CPUs; each request of `poison_tiles` tiles kills rank 1."""

    log: Path
    seconds_per_row: float = 0.0
    poison_tiles: int | None = None

    def __call__(self, replica: Replica) -> Engine:
        assert replica.device == "cuda"
        if replica.tensor_parallel == 1:
            return _Fake(self)
        return _Ranks(self, replica)


class _Ranks:
    def __init__(self, options: OnCpus, replica: Replica) -> None:
        self._options, self._device = options, threading.Lock()  # one device: calls take turns
        self._engine = OvisEngine.from_pretrained(
            replica.model, device="cpu", tensor_parallel=replica.tensor_parallel, num_threads=1
        )
        self._log_ranks()

    @property
    def pids(self) -> list[int]:
        assert isinstance(self._engine.backend, RankPool)
        return self._engine.backend.pids

    def rebuild(self) -> bool:
        before = self.pids
        self._engine.rebuild()
        if self.pids != before:
            self._log_ranks()
        return True

    def measure(self) -> dict[str, float]:
        return self._engine.measure()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        if any(len(request.tiles) == self._options.poison_tiles for request in requests):
            pids = self.pids
            threading.Timer(0.1, lambda: os.kill(pids[1], signal.SIGKILL)).start()
            time.sleep(0.5)
        completions = self._engine.generate(requests, params)
        with self._device:
            time.sleep(self._options.seconds_per_row * len(requests))
        _log_event(self._options.log, rows=len(requests))
        return completions

    def _log_ranks(self) -> None:
        _log_event(self._options.log, leader=os.getpid(), ranks=self.pids, gpus=os.environ["CUDA_VISIBLE_DEVICES"])


class _Fake(FakeEngine):
    def __init__(self, options: OnCpus) -> None:
        import ray

        super().__init__(FakeEngineFactory(seconds_per_row=options.seconds_per_row))
        self._options, self._node = options, ray.get_runtime_context().get_node_id()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        completions = super().generate(requests, params)
        _log_event(self._options.log, rows=len(requests), node=self._node, at_s=time.time())
        return completions


def _log_event(log: Path, **event: Any) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(file, f"{json.dumps(event)}\n".encode())
    os.close(file)


def main() -> int:
    options = json.loads(sys.argv[1])
    engine = OnCpus(Path(sys.argv[2]), options.pop("seconds_per_row", 0.0), options.pop("poison_tiles", None))
    return run_job(lambda: run_pipeline(CaptionConfig(**options), make_engine=engine))


if __name__ == "__main__":
    sys.exit(main())
