"""The ranks of a tensor-parallel replica, seen by the process that owns them: start, feed, watch and end them.

    owner (no torch)  --requests-->  every rank        one private socket each: no port, no name
                      <--completions, signs of life--
    rank 0            --how many of the requests to take in now-->  the others, before each step
    ranks             <--parts of tensors-->  each other: gloo or NCCL

Every rank runs the engine's whole schedule by itself, so that whatever the engine does holds for its ranks too. The
schedule is a function of the requests, of the steps at which they are taken in, and of the tokens: rank 0 decides both
for all, and the ranks compare their counts of work before each step.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.sizing import check_tensor_parallel
from ovis_model.types import Completion, EngineDied, Request, SamplingParams

LOAD_S = 3600.0  # a large checkpoint from a slow disk; a rank that dies while it loads is noticed at once
HANG_S = {"cuda": 30.0, "cpu": 600.0}
"""Without a sign of life from a working rank. One is given before each exchange between ranks: the longest time without
is a pass over 16 tiles, a second on a GPU and minutes on a core."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What a rank process needs to know; `num_threads` None leaves it an equal part of the machine's."""

    directory: Path
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
    post_trunk_norm: bool
    num_threads: int | None
    size: int
    rank: int = 0
    meeting_point: Path = Path()


@dataclass(frozen=True)
class Call:
    """To the ranks: generate these."""

    number: int
    requests: Sequence[Request]
    params: SamplingParams | Sequence[SamplingParams]


@dataclass(frozen=True)
class Abandon:
    """To the ranks: nobody waits for the calls so far."""


@dataclass(frozen=True)
class Ready:
    """From a rank: the model is loaded, on a device of this type."""

    device: str


@dataclass(frozen=True)
class SignOfLife:
    """From a rank."""


@dataclass(frozen=True)
class Done:
    """From rank 0: the outcome of a call."""

    number: int
    outcome: list[Completion] | Exception


@dataclass(frozen=True)
class Fault:
    """From a rank, its last word."""

    error: Exception


class TensorParallelEngine:
    """`tensor_parallel` processes of this machine that share one model, behind `generate`. See `types.Engine`.

    This process holds no part of the model: whatever kills a rank, the others are ended with it, every call raises
    EngineDied, and `rebuild` starts new ones. The ranks end with `close`, with this object and with this process,
    however it ends. Rank i takes the ith of the CUDA devices that this process may use.
    """

    def __init__(
        self,
        path_or_id: str,
        *,
        tensor_parallel: int,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        post_trunk_norm: bool = False,
        revision: str | None = None,
        num_threads: int | None = None,
        hang_s: float | None = None,
    ) -> None:
        """Raises CheckpointError, ConfigError, WeightsError or another ValueError that says what to do; EngineDied."""
        directory = fetch_checkpoint(path_or_id, revision)
        self.config = OvisConfig.from_directory(directory)
        check_tensor_parallel(self.config.language, tensor_parallel)
        self._options = RankOptions(
            directory=directory,
            device=device,
            dtype=dtype,
            post_trunk_norm=post_trunk_norm,
            num_threads=num_threads,
            size=tensor_parallel,
        )
        self._hang_s, self._lock = hang_s, threading.Lock()
        self._ranks = _Ranks(self._options, hang_s)

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """As `OvisEngine.generate`."""
        if not isinstance(params, SamplingParams) and len(params) != len(requests):
            raise ValueError(
                f"{len(params)} sampling parameters for {len(requests)} requests; give one, or one for each"
            )
        return self._ranks.call(requests, params) if requests else []

    def rebuild(self) -> None:
        """Start new ranks if the old ones are gone. Raises EngineDied if these die as well, else as the constructor."""
        with self._lock:
            if not self._ranks.are_alive:
                self._ranks = _Ranks(self._options, self._hang_s)

    @property
    def pids(self) -> list[int]:
        """Of the ranks, in order."""
        return self._ranks.pids

    def close(self) -> None:
        """End the ranks; their devices are free when this returns."""
        self._ranks.close()

    def __enter__(self) -> TensorParallelEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ranks"):  # not if its start failed
            self.close()


class _Ranks:
    """One set of rank processes, from their start to the first fault among them. Then none of them lives."""

    def __init__(self, options: RankOptions, hang_s: float | None) -> None:
        self._hang_s = hang_s
        self._calls: dict[int, Future[list[Completion]]] = {}
        self._next_number = 0
        self._lock = threading.Lock()  # messages reach all ranks in one order
        self._fault: Exception | None = None
        self._ready: Future[None] = Future()
        self._devices: list[str] = []
        self._meeting = TemporaryDirectory(prefix="ovis2-ranks-")
        self._links: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        meeting_point = Path(self._meeting.name) / secrets.token_hex(8)
        self._alive_s = [time.monotonic()] * options.size
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        try:
            for rank in range(options.size):
                self._start(replace(options, rank=rank, meeting_point=meeting_point))
            self._watcher.start()
            self._ready.result(LOAD_S)
        except BaseException:
            self.close()
            raise

    @property
    def are_alive(self) -> bool:
        return self._fault is None

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def call(self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]) -> list[Completion]:
        future: Future[list[Completion]] = Future()
        with self._lock:
            if self._fault is not None:
                raise self._fault
            self._next_number += 1
            self._alive_s = [time.monotonic()] * len(self._links) if not self._calls else self._alive_s
            self._calls[self._next_number] = future
            self._send(Call(self._next_number, requests, params))
        try:
            return future.result()
        except KeyboardInterrupt:
            with self._lock:
                self._send(Abandon())
            raise

    def close(self) -> None:
        self._end(EngineDied("the engine is closed"))
        if self._watcher.ident is not None and self._watcher is not threading.current_thread():
            self._watcher.join()

    def _start(self, options: RankOptions) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Not multiprocessing: it would import the caller's main module again, whatever that does.
            process = subprocess.Popen(
                [sys.executable, "-m", "ovis_model.engine.rank_process", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": _search_path(), "GLOO_SOCKET_IFNAME": "lo"},
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,  # gloo tells its connections there
                pass_fds=[theirs.fileno()],
            )
        self._processes.append(process)
        self._links.append(Connection(ours.detach()))
        self._links[-1].send(options)

    def _send(self, message: Call | Abandon) -> None:
        """A rank that is gone is the watcher's business."""
        data = ForkingPickler.dumps(message)
        for link in self._links:
            with suppress(OSError):
                link.send_bytes(data)

    def _watch(self) -> None:
        """Until a rank dies, hangs or fails."""
        try:
            while self._fault is None:
                for link in wait(self._links, timeout=0.2):
                    assert isinstance(link, Connection)
                    self._receive(self._links.index(link), link.recv())
                self._check_signs_of_life()
        except (EOFError, OSError, EngineDied) as error:
            self._end(self._first_death(error))
        except Exception as error:
            self._end(error)

    def _receive(self, rank: int, message: Any) -> None:
        self._alive_s[rank] = time.monotonic()
        if isinstance(message, Fault):
            raise message.error
        if isinstance(message, Ready):
            self._devices.append(message.device)
            if len(self._devices) == len(self._links):
                if message.device == "cpu":  # gloo has met; NCCL comes back to the meeting point
                    self._meeting.cleanup()
                self._ready.set_result(None)
        if isinstance(message, Done):
            with self._lock:
                future = self._calls.pop(message.number)
            _settle(future, message.outcome)

    def _check_signs_of_life(self) -> None:
        with self._lock:
            silent_s = time.monotonic() - min(self._alive_s) if self._calls else 0.0
        if self._calls and silent_s > (self._hang_s or HANG_S[self._devices[0]]):
            rank = self._alive_s.index(min(self._alive_s))
            raise EngineDied(f"rank {rank} of {len(self._links)} gave no sign of life for {silent_s:.0f} s")

    def _first_death(self, told: Exception) -> EngineDied:
        """The ranks that lost one say so and exit: what was killed is the cause, whoever is heard first."""
        time.sleep(0.2)
        codes = [process.poll() for process in self._processes]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                return EngineDied(f"rank {rank} of {len(codes)} was killed by {signal.Signals(-code).name}")
        if isinstance(told, EngineDied):
            return told
        return EngineDied(f"a rank of {len(codes)} ended without a word; exit codes {codes}")

    def _end(self, fault: Exception) -> None:
        """Kill all ranks and wait for them; calls raise `fault`, or that of an earlier end."""
        with self._lock:
            first = self._fault is None
            self._fault = self._fault or fault
            calls = list(self._calls.values())
            self._calls.clear()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        if first:
            for link in self._links:
                link.close()
            self._meeting.cleanup()
        for future in calls:
            _settle(future, self._fault)
        _settle(self._ready, self._fault)


def _settle(future: Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _search_path() -> str:
    """Of modules, as this process has it now."""
    return os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
