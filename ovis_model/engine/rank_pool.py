"""Start, feed, watch and end the rank processes of a tensor-parallel replica.

    owner (no torch)  --calls-->  every rank           one private socket each: no port, no name
                      <--outcomes, signs of life--
    rank 0            --how many messages to process now-->  the other ranks, before each step
    ranks             <--parts of tensors-->  each other: gloo or NCCL

Every rank runs the whole engine loop, so all ranks do what a single process does. The schedule depends only on the
messages, on the steps at which they are processed, and on the tokens. Rank 0 decides the latter two for all ranks, and
the ranks compare their counts of work before each step.
"""

from __future__ import annotations

import secrets
import signal
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory

from ovis_model.child_process import ChildProcess
from ovis_model.config import OvisConfig
from ovis_model.engine.calls import Calls, EngineOptions, Message, Outcome, Stats, settle
from ovis_model.sizing import check_tensor_parallel
from ovis_model.types import EngineDied

LOAD_S = 3600.0  # enough for a large checkpoint on a slow disk; the death of a loading rank is noticed at once
HANG_S = {"cuda": 30.0, "cpu": 600.0}
"""Maximum time without a sign of life from a working rank, per device. A rank sends one before each exchange between
ranks. The longest time between two is a pass over 16 tiles: a second on a GPU, minutes on one CPU core."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Options of rank `rank` of `size`; all ranks meet at the file `meeting_point`, which does not exist yet."""

    engine: EngineOptions
    size: int
    rank: int
    meeting_point: Path


@dataclass(frozen=True)
class Ready:
    """A rank's report that the model is loaded, with its type of device and a description."""

    device: str
    description: str


@dataclass(frozen=True)
class Done:
    """Rank 0's report of the outcome of a call."""

    number: int
    outcome: Outcome
    stats: Stats


Report = Ready | Done | Exception | None
"""What ranks send: None is a sign of life, an exception is a rank's last message."""


class RankPool:
    """`size` processes of this machine that share one model; this process holds no part of it.

    If a rank dies for any reason, all ranks are ended, every call raises EngineDied, and `rebuild` starts new ranks.
    """

    def __init__(self, options: EngineOptions, config: OvisConfig, size: int, *, hang_s: float | None = None) -> None:
        """Start the ranks. Raise EngineDied, ConfigError, WeightsError or another ValueError that says what to do."""
        check_tensor_parallel(config.language, size)
        self._options, self._size, self._hang_s = options, size, hang_s
        self._lock = threading.Lock()
        self._ranks = _Ranks(options, size, hang_s)

    @property
    def calls(self) -> Calls:
        """The calls of the present ranks."""
        return self._ranks.calls

    @property
    def stats(self) -> Stats:
        """Rank 0's totals at its last outcome."""
        return self._ranks.stats

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in order."""
        return [child.pid for child in self._ranks.children]

    def describe(self) -> str:
        """Describe the ranks, their device and limits in one line."""
        return f"{len(self.pids)} ranks, each on {self._ranks.ready[0].description}"

    def rebuild(self) -> bool:
        """Start new ranks if the old ones are gone; return True."""
        with self._lock:
            if self._ranks.calls.fault is not None:
                self._ranks = _Ranks(self._options, self._size, self._hang_s)
        return True

    def close(self) -> None:
        """End the ranks; their devices are free afterwards."""
        self._ranks.close()


class _Ranks:
    """One set of rank processes, from their start to the first fault, which ends all of them."""

    def __init__(self, options: EngineOptions, size: int, hang_s: float | None) -> None:
        self._hang_s = hang_s
        self.calls, self.stats = Calls(self._send), Stats()
        self.children: list[ChildProcess] = []
        self.ready: list[Ready] = []
        self._all_ready: Future[None] = Future()
        self._meeting = TemporaryDirectory(prefix="ovis2-ranks-")
        self._links: list[Connection] = []
        self._alive_s = [time.monotonic()] * size
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        meeting_point = Path(self._meeting.name) / secrets.token_hex(8)
        try:
            for rank in range(size):
                self._start(RankOptions(engine=options, size=size, rank=rank, meeting_point=meeting_point))
            self._watcher.start()
            self._all_ready.result(LOAD_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._end(EngineDied("the engine is closed"))
        if self._watcher.ident is not None and self._watcher is not threading.current_thread():
            self._watcher.join()

    def _start(self, options: RankOptions) -> None:
        child = ChildProcess(
            "ovis_model.engine.rank_process",
            environment={"GLOO_SOCKET_IFNAME": "lo"},
            stdout=sys.__stderr__,  # gloo reports its connections there
        )
        self.children.append(child)
        self._links.append(Connection(child.socket.detach()))
        self._links[-1].send(options)

    def _send(self, message: Message) -> None:
        """Send to all ranks in the same order; the watcher handles ranks that are gone."""
        data = ForkingPickler.dumps(message)
        for link in self._links:
            with suppress(OSError):
                link.send_bytes(data)

    def _watch(self) -> None:
        """Receive until a rank dies, hangs or fails."""
        try:
            while self.calls.fault is None:
                for link in wait(self._links, timeout=0.2):
                    assert isinstance(link, Connection)
                    self._receive(self._links.index(link), link.recv())
                self._check_signs_of_life()
        except (EOFError, OSError, EngineDied) as error:
            self._end(self._find_cause(error))
        except Exception as error:
            self._end(error)

    def _receive(self, rank: int, report: Report) -> None:
        self._alive_s[rank] = time.monotonic()
        match report:
            case Exception():
                raise report
            case Ready():
                self.ready.append(report)
                if len(self.ready) == len(self._links):
                    if report.device == "cpu":  # gloo is connected; NCCL uses the meeting point again later
                        self._meeting.cleanup()
                    self._all_ready.set_result(None)
            case Done():
                self.stats = report.stats
                self.calls.settle(report.number, report.outcome)

    def _check_signs_of_life(self) -> None:
        """Raise EngineDied if a rank has been silent for too long while there is work."""
        silent_s = time.monotonic() - max(self.calls.busy_since_s, min(self._alive_s))
        if self.calls.is_busy and silent_s > (self._hang_s or HANG_S[self.ready[0].device]):
            rank = self._alive_s.index(min(self._alive_s))
            raise EngineDied(f"rank {rank} of {len(self._links)} sent no sign of life for {silent_s:.0f} s")

    def _find_cause(self, reported: Exception) -> EngineDied:
        """Return the kill of a rank as the cause, if there was one.

        The ranks that lost it report that loss and exit, perhaps earlier.
        """
        time.sleep(0.2)
        codes = [child.poll() for child in self.children]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                return EngineDied(f"rank {rank} of {len(codes)} was killed by {signal.Signals(-code).name}")
        if isinstance(reported, EngineDied):
            return reported
        return EngineDied(f"a rank of {len(codes)} ended without a report; exit codes {codes}")

    def _end(self, fault: Exception) -> None:
        """Kill all ranks and wait for them; calls raise `fault`, or the fault of an earlier end."""
        self.calls.fail(fault, self._kill)
        settle(self._all_ready, self.calls.fault)

    def _kill(self) -> None:
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()
        for link in self._links:
            link.close()
        self._meeting.cleanup()
