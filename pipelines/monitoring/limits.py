"""Find out what limits a run from the busy shares of its stages, and say what would help."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.monitoring.usage import Reading

WINDOW_S = 60.0
_BUSY = 0.75  # a stage with a larger share of its time at work has no room
_FULL = 0.5  # a replica with all calls in use for a larger share has rows waiting
_HELP_ENGINE = "add replicas (GPUs), or lower --max-tiles or --max-new-tokens"

LimitName = Literal["prepare", "read", "engine", "driver", "none"]
Readings = Mapping[str, Mapping[str, Reading]]
"""{stage: {actor: reading}}; the stages are `preprocessor` and `replica`."""


@dataclass(frozen=True)
class StageUse:
    """How a stage used its time, as shares of the time since its actors were ready; `actors` of them were measured."""

    actors: int = 0
    busy: float = 0.0
    waiting: float = 0.0
    full: float = 0.0
    rows_per_s: float = 0.0
    occupancy: float | None = None
    peak_bytes: int = 0

    @property
    def idle(self) -> float:
        """The share of the time without work."""
        return 1.0 - self.busy


@dataclass(frozen=True)
class Use:
    """How a run used its processes. `driver`: share of the driver's time at work; `object_store`: share in use."""

    preprocessor: StageUse = StageUse()
    replica: StageUse = StageUse()
    driver: float = 0.0
    object_store: float = 0.0


@dataclass(frozen=True)
class Limit:
    """What limits a run, and a line about it for users."""

    name: LimitName
    line: str


def summarize_stage(readings: Mapping[str, Reading]) -> StageUse:
    """Return the shares of a stage from the readings of its actors."""
    total = sum(readings.values(), Reading())
    ready_s = max(total.ready_s, 1e-9)
    slots = total.engine.get("slot_steps", 0.0)
    # The rate of the pool while its actors are ready: that of an actor times their number.
    return StageUse(
        actors=len(readings),
        busy=_clip(total.busy_s / ready_s),
        waiting=_clip(total.waiting_s / ready_s),
        full=_clip(total.full_s / ready_s),
        rows_per_s=total.rows / ready_s * len(readings),
        occupancy=total.engine["sequence_steps"] / slots if slots else None,
        peak_bytes=total.peak_bytes,
    )


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))


class UseWindow:
    """Turns the totals that actors report from time to time into shares of about the last minute."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, Readings]] = deque()

    def add(self, readings: Readings, now_s: float) -> None:
        """Take the present totals."""
        self._seen.append((now_s, readings))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= self._window_s:
            self._seen.popleft()

    def summarize(self, stage: str) -> StageUse:
        """Return the shares of a stage since the start of the window; of an actor that is new, since it was ready."""
        if not self._seen:
            return StageUse()
        before, now = (self._seen[place][1].get(stage, {}) for place in (0, -1))
        if len(self._seen) == 1:
            before = {}
        changes = {actor: now[actor] - before.get(actor, Reading()) for actor in now}
        return summarize_stage({actor: change for actor, change in changes.items() if change.ready_s > 0})


def find_limit(use: Use) -> Limit:
    """Return what limits a run that uses its processes so."""
    cpus, engine = use.preprocessor, use.replica
    if use.driver > _BUSY:
        return Limit("driver", f"the driver, busy {_format_share(use.driver)}; run several with --shard I/N")
    has_queue = engine.full > _FULL
    if engine.busy > _BUSY and (has_queue or cpus.busy <= _BUSY):
        return Limit("engine", f"the engine, preprocessors idle {_format_share(cpus.idle)}; {_HELP_ENGINE}")
    if cpus.busy > _BUSY or (cpus.busy > engine.busy and cpus.busy > _BUSY * _BUSY):
        return _describe_cpu_limit(cpus, engine)
    idle = f"engine idle {_format_share(engine.idle)}, preprocessors idle {_format_share(cpus.idle)}"
    return Limit("none", f"no stage alone, {idle}; usual at the start and the end of a run")


def _describe_cpu_limit(cpus: StageUse, engine: StageUse) -> Limit:
    more = _count_missing(cpus, engine)
    give = f"give ~{more} more" if more else "give more"
    if cpus.waiting > cpus.busy / 2:
        waiting = f"preprocessors wait for it {_format_share(cpus.waiting)} of the time"
        return Limit(
            "read", f"the store of the images, {_describe_idle(engine)}; {waiting}; {give} --num-preprocessors"
        )
    return Limit("prepare", f"CPUs that prepare, {_describe_idle(engine)}; {give} or lower --max-tiles")


def _count_missing(cpus: StageUse, engine: StageUse) -> int:
    """Return how many preprocessors more would keep the engine busy; 0 if it is busy, but not with all it could run."""
    return round(cpus.actors * (1 / max(engine.busy, 0.01) - 1))


def _format_share(share: float) -> str:
    return f"{100 * share:.0f} %"


def _describe_idle(engine: StageUse) -> str:
    if engine.idle > 0.05 or engine.occupancy is None:
        return f"engine idle {_format_share(engine.idle)}"
    return f"engine busy, but only {_format_share(engine.occupancy)} full"
