"""Follow a run: the limit in its progress line, OUTPUT/progress.json, metrics, and the figures for run.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

from pipelines.errors import LeaseLost, StoreFault
from pipelines.monitoring.limits import Limit, Readings, Use, UseWindow, find_limit, summarize_stage
from pipelines.monitoring.metrics import RunMetrics
from pipelines.monitoring.phases import Phases
from pipelines.monitoring.progress import RunProgress
from pipelines.monitoring.usage import Meter, Reading, read_peak_bytes
from pipelines.output.lease import Lease
from pipelines.storage import store

PROGRESS = "progress.json"
WRITE_EVERY_S = 60.0
_STAGES = ("preprocessor", "replica")

Json = dict[str, Any]


class RunMonitor:
    """Follows one run; `observe` is called by a thread every few seconds, the rest by the driver."""

    def __init__(self, output: str, lease: Lease, progress: RunProgress, phases: Phases) -> None:
        """Begin the phase `load`."""
        self._output, self._lease, self.progress, self._phases = output, lease, progress, phases
        phases.begin("load")
        self._driver, self._window = Meter(), UseWindow()
        self._totals: dict[str, dict[str, Reading]] = {stage: {} for stage in _STAGES}
        self._written_s = time.monotonic()
        self._object_store = 0.0
        self._metrics: RunMetrics | None = None
        self.ready_s: float | None = None  # when the first replica got rows, on the monotonic clock

    @contextmanager
    def handle_rows(self) -> Iterator[None]:
        """Count the time in the context as work of the driver."""
        self._phases.begin("rows")
        with self._driver.work():
            yield

    def begin_check(self) -> None:
        """Begin the phase `check`: all rows are written."""
        self._phases.begin("check")

    def observe(self, readings: Readings, object_store: float) -> None:
        """Take the present totals of all actors, and the share of the object store in use."""
        now_s = time.monotonic()
        for stage in _STAGES:
            self._totals[stage].update(readings.get(stage, {}))
        self._object_store = max(self._object_store, object_store)
        driver = {"driver": {"": self._driver.read()}}
        self._window.add({**{stage: dict(found) for stage, found in self._totals.items()}, **driver}, now_s)
        if ready_for_s := max((reading.ready_s for reading in self._totals["replica"].values()), default=0.0):
            self.ready_s = now_s - ready_for_s if self.ready_s is None else self.ready_s
            self.progress.begin(ready_for_s)
        use = self._measure_window(object_store)
        limit = find_limit(use)
        self._show(use, limit)
        if now_s - self._written_s >= WRITE_EVERY_S:
            self._written_s = now_s
            self._write(use, limit)

    def finish(self) -> Json:
        """Write progress.json a last time and return the figures of the whole run, for run.json."""
        use = self.summarize()
        limit = find_limit(use)
        self._write(use, limit)
        replicas = sum(self._totals["replica"].values(), Reading())
        return {
            "seconds": {phase: round(seconds, 3) for phase, seconds in self._phases.read().items()},
            "limited_by": limit.name,
            **_describe_use(use),
            "driver_peak_bytes": read_peak_bytes(),
            "engine": {name: round(value, 3) for name, value in sorted(replicas.engine.items())},
        }

    def summarize(self) -> Use:
        """Return how the whole session has used its processes so far."""
        preprocessor, replica = (summarize_stage(self._totals[stage]) for stage in _STAGES)
        return Use(preprocessor, replica, summarize_stage({"": self._driver.read()}).busy, self._object_store)

    def _measure_window(self, object_store: float) -> Use:
        preprocessor, replica = (self._window.summarize(stage) for stage in _STAGES)
        return Use(preprocessor, replica, self._window.summarize("driver").busy, object_store)

    def _show(self, use: Use, limit: Limit) -> None:
        if not self.progress.num_new:  # while actors start, nothing limits the run but that
            return
        self.progress.note_limit(limit)
        self._metrics = self._metrics or RunMetrics(_get_name(self._output))
        self._metrics.export(self.progress.describe(), use, limit)

    def _write(self, use: Use, limit: Limit) -> None:
        """Write progress.json if this driver still holds the lease; a store that fails now gets it the next time."""
        found = {**self.progress.describe(), "limited_by": limit.name, "limit": limit.line, **_describe_use(use)}
        with suppress(OSError, StoreFault, LeaseLost):
            self._lease.check()
            store.write_bytes(store.join(self._output, PROGRESS), json.dumps(found, indent=2).encode())


def _describe_use(use: Use) -> Json:
    rounded = {
        stage: asdict(
            replace(
                found,
                **{name: round(getattr(found, name), 4) for name in ("busy", "waiting", "full", "rows_per_s")},
                occupancy=None if found.occupancy is None else round(found.occupancy, 4),
            )
        )
        | {"idle": round(found.idle, 4)}
        for stage, found in (("preprocessors", use.preprocessor), ("replicas", use.replica))
    }
    return {**rounded, "driver_busy": round(use.driver, 4), "object_store": round(use.object_store, 4)}


def _get_name(output: str) -> str:
    return store.redact(output).rstrip("/").rpartition("/")[2] or "run"
