"""Count on which work the processes of a stage died, and keep the results of rows that were tried alone.

Ray restarts an actor and repeats its work without limit, so a row that kills its process would never finish. But a
process is also killed from outside (by a spot market, an operator, the kernel when memory runs out), and then no row is
to blame. The counts live in an actor of their own, which survives those processes.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.actor import register_fast_exit
from pipelines.cluster.exits import Exit, Process, find_exit, identify_process
from pipelines.errors import ProcessesDie
from pipelines.monitoring.events import Event, make_event
from pipelines.monitoring.usage import REPORT_EVERY_S, PoolReadings, Reading

MAX_TRIES = 2  # of a batch, before its rows are tried alone
CONTROL = -1  # in place of a row number: a row known to be harmless, which runs between suspects
_MIN_LAST = 6  # suspects and controls together: so many trials per process show soon that only one of them dies
_MAX_CHANCE = 1e-4  # a row is blamed once deaths from outside explain its own with a smaller probability
WARN_DEATHS, MAX_DEATHS, MIN_PATIENCE_S = 5, 20, 300.0  # of one actor, while no row of its stage is finished

_ANSWER_S = 10.0

DIED = "the process died"
GIVEN_UP = (
    f"{DIED} each time this row was tried alone, while other rows got through; it may still have been killed from "
    "outside: --retry-errors tries the row again"
)

Result = Any
"""What a stage keeps of a row tried alone: a table of one row, or None."""


@dataclass(frozen=True)
class Alone:
    """The state of a batch whose rows are tried alone.

    kept: results of those that got through, by row number.
    order: the others. After those that no process died on come the suspects and CONTROL, in random order.
    """

    kept: dict[int, Result]
    order: list[int]


class AttemptCounts:
    """Attempts and deaths of one stage. Lives in an AttemptActor, or in this process without Ray."""

    def __init__(
        self,
        stage: str = "process",
        find: Callable[[Process], Exit] = find_exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        register_fast_exit()
        self._stage, self._find_exit, self._clock, self._random = stage, find, clock, random.Random(0)
        self._processes: dict[str, Process] = {}  # by actor: the last one
        self._running: defaultdict[str, Counter[str | int]] = defaultdict(Counter)  # by actor
        self._begun: Counter[str | int] = Counter()  # attempts that have not ended, by batch and by row tried alone
        self._kept: defaultdict[str, dict[int, Result]] = defaultdict(dict)
        self._num_survived, self._num_hits = 0, 0  # trials of rows alone that ended, and died on a row that later ended
        self._died: Counter[str] = Counter()  # deaths by actor since a row of the stage was finished
        self._died_since_s = 0.0
        self._noted: dict[str, str] = {}  # by actor: why its engine died, until its next attempt
        self._unread: list[Exit] = []
        self._events: list[Event] = []
        self._readings = PoolReadings()

    def start(self, process: Process | None = None) -> None:
        """Register an actor's process before it begins to work; the last one has died then. Raise ProcessesDie."""
        if process is None:  # without Ray, no process is replaced
            return
        actor, before = process.actor, self._processes.get(process.actor)
        self._processes[actor] = process
        self._readings.restart(actor)
        running, noted = self._running.pop(actor, Counter()), self._noted.pop(actor, "")
        if before is not None:
            exit_ = self._find_exit(before)
            if exit_.is_outside:
                self._begun -= running
            if not noted:
                self._count_death(exit_, actor)
        self._note("start", actor)

    def note_death(self, reason: str, actor: str = "") -> None:
        """Count the death of an actor's engine, once for all calls that it ended. Raise ProcessesDie."""
        if actor not in self._noted:
            self._noted[actor] = reason
            self._count_death(Exit("unknown", "", reason), actor)

    def _count_death(self, exit_: Exit, actor: str) -> None:
        self._unread.append(exit_)
        self._note("death", actor, kind=exit_.kind, address=exit_.address, reason=exit_.reason)
        self._died_since_s = self._died_since_s if self._died else self._clock()
        self._died[actor] += 1
        waited_s = self._clock() - self._died_since_s
        if self._died[actor] >= MAX_DEATHS and waited_s >= MIN_PATIENCE_S:
            raise ProcessesDie(
                f"a {self._stage} died {self._died[actor]} times in {waited_s / 60:.0f} minutes while no row was "
                f"finished; last: {exit_.reason}"
            )

    def begin(self, work: str, actor: str = "") -> int:
        """Return how often `work` has begun without ending, this attempt included."""
        self._begin(work, actor)
        if self._begun[work] > 1:
            self._note("retry", actor, work=work, attempt=self._begun[work])
        return self._begun[work]

    def end(self, work: str, actor: str = "", *, reading: Reading | None = None) -> None:
        """Forget `work`, which is finished; `reading` is what its actor has measured."""
        self._end(work, actor)
        if reading is not None:
            self._readings.add(actor, reading)
        del self._begun[work]
        self._kept.pop(work, None)
        self._died.clear()

    def resume_alone(self, work: str, rows: Sequence[int]) -> Alone:
        """Return what is kept of a batch, and the order in which to try its other rows."""
        kept = self._kept[work]
        suspects = [row for row in rows if row not in kept and self._begun[row]]
        # Processes may be killed a fixed time after their start: no suspect may always be tried at that time.
        last = [*suspects, *[CONTROL] * max(1, _MIN_LAST - len(suspects))] if suspects else []
        self._random.shuffle(last)
        return Alone(dict(kept), [row for row in rows if row not in kept and not self._begun[row]] + last)

    def begin_alone(self, row: int, actor: str = "") -> bool:
        """Begin to try a row alone, or return False if the row is to blame for its deaths."""
        if row != CONTROL and self._is_to_blame(row):
            return False
        self._begin(row, actor)
        if row != CONTROL and self._begun[row] > 1:
            self._note("retry", actor, work=f"row {row} alone", attempt=self._begun[row])
        return True

    def end_alone(self, work: str, row: int, result: Result = None, actor: str = "") -> None:
        """Keep the result of a row that got through."""
        self._end(row, actor)
        self._num_survived += 1
        if row == CONTROL:
            return
        self._num_hits += self._begun.pop(row, 0)
        if row not in self._kept[work]:
            self._died.clear()
        self.keep(work, row, result)

    def keep(self, work: str, row: int, result: Result = None) -> None:
        """Keep the result of a row, for the process that tries the rest of its batch."""
        self._kept[work][row] = result

    def read_kept(self) -> list[Result]:
        """Return the results of all rows whose batches are not finished."""
        return [result for kept in self._kept.values() for result in kept.values()]

    def read_deaths(self) -> tuple[list[Exit], int]:
        """Return the deaths since the last call, and the number of an actor's deaths since a row was finished."""
        unread, self._unread = self._unread, []
        return unread, max(self._died.values(), default=0)

    def report(self, reading: Reading, actor: str = "") -> None:
        """Take what an actor has measured."""
        self._readings.add(actor, reading)

    def follow(self, read: Callable[[], Reading]) -> None:
        """Do nothing: without Ray, readings come with `end`."""

    def read_use(self) -> tuple[dict[str, Reading], list[Event]]:
        """Return the readings of all actors, and the events since the last call."""
        events, self._events = self._events, []
        return self._readings.read(), events

    def _note(self, event: str, actor: str, **fields: str | int) -> None:
        process = self._processes.get(actor)
        place = {"actor": actor, "address": process.address if process else ""}
        self._events.append(make_event(event, self._stage, {**place, **fields}))

    def _begin(self, work: str | int, actor: str) -> None:
        self._begun[work] += 1
        self._running[actor][work] += 1
        self._noted.pop(actor, None)

    def _end(self, work: str | int, actor: str) -> None:
        self._begun[work] -= 1
        self._running[actor][work] -= 1

    def _is_to_blame(self, row: int) -> bool:
        """Return whether deaths from outside would hardly ever hit this row as often as its process died.

        Their rate is estimated from the trials of rows known to be harmless: the control, and rows that got through.
        """
        hits = self._num_hits + self._begun[CONTROL]
        rate = (hits + 1) / (hits + self._num_survived + 2)  # Laplace's rule of succession
        return bool(rate ** self._begun[row] < _MAX_CHANCE)


class AttemptActor:
    """The AttemptCounts of all stages of a run, in one process."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._counts = {stage: AttemptCounts(stage) for stage in stages}

    def call(self, stage: str, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the AttemptCounts of `stage`."""
        return getattr(self._counts[stage], method)(*arguments, **named)


def start_attempt_counts(*stages: str) -> list[RemoteAttempts]:
    """Start an AttemptActor and return its proxies. It runs on the driver's node, so that it survives all others."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    actor = ray.remote(AttemptActor).options(**options).remote(stages)
    return [RemoteAttempts(actor, stage) for stage in stages]


class RemoteAttempts:
    """Proxy of a stage's AttemptCounts in an AttemptActor. Waits for the actor unless stated otherwise."""

    def __init__(self, actor: Any, stage: str) -> None:
        self._actor, self._stage, self._me = actor, stage, ""

    def read_kept(self) -> list[Result]:
        """Return `AttemptCounts.read_kept`; nothing if Ray is gone or does not answer."""
        import ray

        try:
            kept: list[Result] = ray.get(self._send("read_kept"), timeout=_ANSWER_S)
        except (ray.exceptions.RayError, RuntimeError):
            return []
        return kept

    def read_deaths(self) -> tuple[list[Exit], int]:
        """Return `AttemptCounts.read_deaths`. Raise an exception of Ray if the actor does not answer."""
        import ray

        deaths: tuple[list[Exit], int] = ray.get(self._send("read_deaths"), timeout=_ANSWER_S)
        return deaths

    def read_use(self) -> tuple[dict[str, Reading], list[Event]]:
        """Return `AttemptCounts.read_use`. Raise an exception of Ray if the actor does not answer."""
        import ray

        use: tuple[dict[str, Reading], list[Event]] = ray.get(self._send("read_use"), timeout=_ANSWER_S)
        return use

    def start(self) -> None:
        """Register this process before it begins to work. Raise ProcessesDie."""
        process = identify_process()
        self._me = process.actor
        self._call("start", process)

    def note_death(self, reason: str) -> None:
        """Count the death of this process's engine. Raise ProcessesDie."""
        self._call("note_death", reason, self._me)

    def begin(self, work: str) -> int:
        """Return how often `work` has begun without ending, this attempt included."""
        return int(self._call("begin", work, self._me))

    def end(self, work: str, *, reading: Reading | None = None) -> None:
        """Forget `work`, which is finished. Does not wait."""
        self._send("end", work, self._me, reading=reading)

    def follow(self, read: Callable[[], Reading]) -> None:
        """Report what this process measures every few seconds, also while it waits for work."""
        threading.Thread(target=self._report, args=(read,), name="report", daemon=True).start()

    def _report(self, read: Callable[[], Reading]) -> None:
        while True:
            time.sleep(REPORT_EVERY_S)
            self._send("report", read(), self._me)

    def resume_alone(self, work: str, rows: Sequence[int]) -> Alone:
        """Return what is kept of a batch, and the order in which to try its other rows."""
        alone: Alone = self._call("resume_alone", work, rows)
        return alone

    def begin_alone(self, row: int) -> bool:
        """Begin to try a row alone, or return False if the row is to blame for its deaths."""
        return bool(self._call("begin_alone", row, self._me))

    def end_alone(self, work: str, row: int, result: Result = None) -> None:
        """Keep the result of a row that got through."""
        self._call("end_alone", work, row, result, self._me)

    def keep(self, work: str, row: int, result: Result = None) -> None:
        """Keep the result of a row, for the process that tries the rest of its batch."""
        self._call("keep", work, row, result)

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(self._send(method, *arguments))
        except ProcessesDie as error:  # without the trace of the actor
            raise ProcessesDie(str(error.cause)) from None  # type: ignore[attr-defined]

    def _send(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method without waiting -> the reference of its result."""
        return self._actor.call.remote(self._stage, method, *arguments, **named)


Attempts = AttemptCounts | RemoteAttempts
