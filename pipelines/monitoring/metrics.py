"""Export a run to Prometheus through Ray, which prefixes each name with `ray_`; docs/operate.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pipelines.monitoring.limits import Limit, LimitName, StageUse, Use

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ovis2_rows": ("Rows of the run by state: total, done (earlier runs included), error (of this run).", ("state",)),
    "ovis2_rows_per_second": ("Rows finished per second since the first row.", ()),
    "ovis2_output_tokens_per_second": ("Output tokens per second since the first row.", ()),
    "ovis2_eta_seconds": ("Remaining time at the present rate, start-up not counted.", ()),
    "ovis2_actors": ("Actors of a stage that report.", ("stage",)),
    "ovis2_stage_busy_ratio": ("Share of the last minute that a stage was at work.", ("stage",)),
    "ovis2_stage_rows_per_second": ("Rows per second of a stage in the last minute.", ("stage",)),
    "ovis2_stage_peak_memory_bytes": ("Largest resident memory of a process of a stage.", ("stage",)),
    "ovis2_read_wait_ratio": ("Share of the last minute that preprocessors waited for bytes of a store.", ()),
    "ovis2_engine_occupancy_ratio": ("Share of the engine's slots in use, averaged over its decode steps.", ()),
    "ovis2_object_store_ratio": ("Share of the memory of Ray's object stores that is in use.", ()),
    "ovis2_limit": ("1 for what limits the run, else 0: prepare, read, engine, driver or none.", ("limit",)),
}
"""{name: (description, labels besides `run`)}. All are gauges; `run` is the last part of OUTPUT's path."""


class RunMetrics:
    """The gauges of one run."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = run
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("run", *labels)) for name, (text, labels) in METRICS.items()
        }

    def export(self, progress: Mapping[str, Any], use: Use, limit: Limit) -> None:
        """Set all gauges. `progress` is `RunProgress.describe()`."""
        self._set("ovis2_rows", progress["rows"], state="total")
        self._set("ovis2_rows", progress["done"], state="done")
        self._set("ovis2_rows", progress["errors"], state="error")
        self._set("ovis2_rows_per_second", progress["rows_per_s"])
        self._set("ovis2_output_tokens_per_second", progress["output_tokens_per_s"])
        if progress["eta_s"] is not None:
            self._set("ovis2_eta_seconds", progress["eta_s"])
        self._set("ovis2_stage_busy_ratio", use.driver, stage="driver")
        for stage, found in (("preprocessor", use.preprocessor), ("replica", use.replica)):
            self._export_stage(stage, found)
        self._set("ovis2_read_wait_ratio", use.preprocessor.waiting)
        self._set("ovis2_object_store_ratio", use.object_store)
        if use.replica.occupancy is not None:
            self._set("ovis2_engine_occupancy_ratio", use.replica.occupancy)
        for name in get_args(LimitName):
            self._set("ovis2_limit", float(name == limit.name), limit=name)

    def _export_stage(self, stage: str, use: StageUse) -> None:
        self._set("ovis2_actors", use.actors, stage=stage)
        self._set("ovis2_stage_busy_ratio", use.busy, stage=stage)
        self._set("ovis2_stage_rows_per_second", use.rows_per_s, stage=stage)
        self._set("ovis2_stage_peak_memory_bytes", use.peak_bytes, stage=stage)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name].set(value, {"run": self._run, **labels})
