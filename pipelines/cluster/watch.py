"""Report from a thread of the driver why a run waits and which processes died: one line at a time, on stderr."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

from ovis_model.wording import count_nouns
from pipelines.cluster.attempts import MAX_DEATHS, MIN_PATIENCE_S, WARN_DEATHS, RemoteAttempts
from pipelines.cluster.census import Census, has_autoscaler, take_census
from pipelines.cluster.exits import Exit
from pipelines.cluster.resources import Pools
from pipelines.monitoring.limits import Readings

_LOOK_S = 5.0
FIRST_REPORT_S, NEXT_REPORT_S = 15.0, 60.0  # of waiting, and of further deaths of the same kind
_ANSWER_S = 10.0

logger = logging.getLogger(__name__)


class Watch:
    """A context manager that watches the pools of a run; `attempts` by stage.

    `observe` gets what the actors have measured, and the share of the object store that is in use.
    """

    def __init__(
        self,
        pools: Pools,
        attempts: Mapping[str, RemoteAttempts],
        observe: Callable[[Readings, float], None],
        *,
        autoscale: bool,
    ) -> None:
        self._attempts, self._observe, self._deaths = attempts, observe, DeathReports()
        self._waiting = WaitReports(
            {"replicas": pools.num_replicas, "preprocessors": pools.num_preprocessors}, autoscale
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join(timeout=_ANSWER_S)
        with suppress(Exception):  # Ray may be gone
            for line in self._read_deaths(time.monotonic()):  # those since the last look
                logger.warning("%s", line)
            self._report_use()

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_S):
            # While Ray shuts down or its head restarts, it raises exceptions of many kinds. No run ends for a report.
            with suppress(Exception):
                self._look(time.monotonic())

    def _look(self, now_s: float) -> None:
        self._log(*self._read_deaths(now_s))
        self._log(*self._waiting.report(take_census(), now_s))
        self._report_use()

    def _read_deaths(self, now_s: float) -> list[str]:
        """Return the lines about deaths that are due."""
        lines = []
        for stage, attempts in self._attempts.items():
            exits, in_a_row = attempts.read_deaths()
            lines += self._deaths.report(stage, exits, in_a_row, now_s)
        return lines

    def _report_use(self) -> None:
        """Pass on what the actors have measured, and log what happened to them, unless stderr is a terminal."""
        readings = {}
        for stage, attempts in self._attempts.items():
            readings[stage], events = attempts.read_use()
            for event in [] if sys.stderr.isatty() else events:
                logger.warning("%s", event)
        self._observe(readings, _read_object_store_share())

    def _log(self, *lines: str) -> None:
        for line in lines:
            if not self._closed.is_set():
                logger.warning("%s", line)


def _read_object_store_share() -> float:
    """Return the share of the memory of all object stores that is in use."""
    import ray

    total = ray.cluster_resources().get("object_store_memory", 0.0)
    return 1 - ray.available_resources().get("object_store_memory", 0.0) / total if total else 0.0


class DeathReports:
    """Collects deaths into lines: the first of each kind and node at once, later ones at most once a minute."""

    def __init__(self) -> None:
        self._unsaid: dict[tuple[str, str, str], Counter[str]] = {}  # by stage, kind and node
        self._said_s: dict[tuple[str, str, str], float] = {}
        self._warned: set[str] = set()

    def report(self, stage: str, exits: list[Exit], in_a_row: int, now_s: float) -> list[str]:
        """Return the lines that are due. `in_a_row`: deaths of one actor since a row was finished."""
        for exit_ in exits:
            self._unsaid.setdefault((stage, exit_.kind, exit_.address), Counter())[exit_.reason] += 1
        due = [key for key in self._unsaid if now_s - self._said_s.get(key, -NEXT_REPORT_S) >= NEXT_REPORT_S]
        lines = [_describe_deaths(*key[:2], self._unsaid.pop(key)) for key in due]
        self._said_s |= dict.fromkeys(due, now_s)
        if in_a_row < WARN_DEATHS:
            self._warned.discard(stage)
        elif stage not in self._warned:
            self._warned.add(stage)
            lines.append(
                f"a {stage} died {in_a_row} times and no row was finished in between; after {MAX_DEATHS} times and at "
                f"least {MIN_PATIENCE_S / 60:.0f} minutes the run stops"
            )
        return lines


def _describe_deaths(stage: str, kind: str, reasons: Counter[str]) -> str:
    processes, reason = count_nouns(reasons.total(), stage), list(reasons)[-1]
    if kind == "memory":
        return (
            f"Ray killed {processes} because {reason}; use fewer --num-preprocessors or nodes with more memory. Their "
            "rows run again"
        )
    return f"{processes} died ({reason}); their rows run again"


class WaitReports:
    """Says after 15 s and then every minute that actors have not started; `wanted`: their number by pool."""

    def __init__(self, wanted: Mapping[str, int], autoscale: bool) -> None:
        self._wanted, self._autoscale = wanted, autoscale
        self._since_s: float | None = None
        self._next_s = 0.0

    def report(self, census: Census, now_s: float) -> list[str]:
        """Return the line that is due."""
        if not census.unready.total():
            self._since_s = None
            return []
        if self._since_s is None:
            self._since_s, self._next_s = now_s - _LOOK_S, now_s - _LOOK_S + FIRST_REPORT_S
        if now_s < self._next_s:
            return []
        self._next_s = now_s + NEXT_REPORT_S
        return [f"waiting for {now_s - self._since_s:.0f} s: {self._describe(census)}"]

    def _describe(self, census: Census) -> str:
        counts = census.alive + census.ended
        started = " and ".join(
            f"{min(number, counts[pool])} of {number} {pool}" for pool, number in self._wanted.items()
        )
        parts = [f"{started} have started"]
        if waiting := census.unplaced.total():
            total = {name: census.total.get(name, 0) for name in ("CPU", "GPU") if census.total.get(name)}
            free = " and ".join(f"{census.free.get(name, 0):g} of {total[name]:g} {name}s" for name in total)
            parts.append(
                f"{waiting} wait for a node with free resources; the cluster has {free or 'no CPU or GPU'} free"
            )
            parts += [f"another job holds {job}" for job in census.others]
            if self._autoscale and has_autoscaler() is False:
                parts.append("--autoscale is set, but this cluster has no autoscaler that could start nodes")
        if loading := census.unready.total() - waiting:
            parts.append(f"{loading} are loading")
        return "; ".join(parts)
