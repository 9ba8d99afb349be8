"""Really run some rows, in a directory of their own, until their rate can be told."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.config import RunConfig
from pipelines.generate import EngineFactory
from pipelines.monitoring.limits import Use
from pipelines.monitoring.phases import Phases
from pipelines.monitoring.progress import RunProgress
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger
from pipelines.output.monitor import RunMonitor
from pipelines.output.run_record import Run
from pipelines.output.sink import Sink
from pipelines.pipeline import stream_results
from pipelines.plan import Plan
from pipelines.storage import store

Json = dict[str, Any]

MAX_ROWS = 2_000  # spread over the input; a trial ends before it has done so many, unless they are quick
TRIAL_S = 20.0


@dataclass(frozen=True)
class Trial:
    """What a trial measured.

    rows: finished ones. rows_per_s: of the run since the first replica got rows, rows in the engine counted by their
    tokens. startup_s: from the trial's start until then. bytes_per_row: of the files in OUTPUT/data.
    """

    rows: int
    errors: int
    output_tokens: int
    rows_per_s: float
    startup_s: float
    bytes_per_row: float
    use: Use
    figures: Json


def run_trial(
    config: RunConfig,
    run: Run,
    plan: Plan,
    lease: Lease,
    make_engine: EngineFactory,
    *,
    started_s: float,
    min_rows: int,
) -> Trial:
    """Run the rows of `run` until `min_rows` are done and TRIAL_S have passed, or none is left.

    `started_s` is when Ray began to start, on the monotonic clock.
    """
    ledger = Ledger()
    with RunProgress(run.num_rows, 0) as progress, Sink(run.data_uri, ledger, lease, rows_per_file=1 << 12) as sink:
        monitor = RunMonitor(run.output, lease, progress, Phases())
        results = stream_results(config, run, plan, ledger.find_missing(run.num_rows), monitor, make_engine)
        stopped_s = _consume(results, sink, monitor, min_rows)
    figures = monitor.finish()
    ready_s = monitor.ready_s or started_s
    return Trial(
        rows=progress.num_new,
        errors=ledger.num_errors,
        output_tokens=progress.num_tokens,
        rows_per_s=_count_work(run, progress, figures["engine"]) / max(stopped_s - ready_s, 1e-3),
        startup_s=ready_s - started_s,
        bytes_per_row=sum(info.num_bytes for info in store.list_files(run.data_uri)) / max(1, progress.num_new),
        use=monitor.summarize(),
        figures=figures,
    )


def _consume(results: Generator[pa.Table, None, None], sink: Sink, monitor: RunMonitor, min_rows: int) -> float:
    """Take results until there are enough; return when the last ones came."""
    stopped_s = first_s = 0.0
    with closing(results):
        for table in results:
            with monitor.handle_rows():
                monitor.progress.add(sink.add(table))
            stopped_s = time.monotonic()
            first_s = first_s or stopped_s
            if monitor.progress.num_new >= min_rows and stopped_s - (monitor.ready_s or first_s) >= TRIAL_S:
                break
    return stopped_s


def _count_work(run: Run, progress: RunProgress, engine: Json) -> float:
    """Count the finished rows, and of those that still run the share of their output tokens that exists."""
    done = progress.num_new
    if done == run.num_rows or not progress.num_tokens:
        return done
    return max(float(done), done * float(engine.get("sequence_steps", 0.0)) / progress.num_tokens)
