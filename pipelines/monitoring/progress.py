"""Show progress, rates and the remaining time on stderr: a bar on a terminal, lines at intervals in a log."""

from __future__ import annotations

import math
import sys
import time
from datetime import UTC, datetime
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from rich import progress as rich_progress
from rich.console import Console

from ovis_model.wording import count_nouns
from pipelines.monitoring.limits import Limit

_LOG_EVERY_S = 10.0


class Rate:
    """Units per second, without the start-up: from `begin` on or, until it is called, from the first units on."""

    def __init__(self) -> None:
        self._started_s, self._first_s, self._first_count = time.monotonic(), 0.0, 0
        self._begun_s: float | None = None
        self.count = 0

    def begin(self, seconds_ago: float) -> None:
        """Set when the start-up ended; the first call counts."""
        self._begun_s = time.monotonic() - seconds_ago if self._begun_s is None else self._begun_s

    def add(self, count: int) -> None:
        """Count units that were finished just now."""
        if not self.count:
            self._first_s, self._first_count = time.monotonic(), count
        self.count += count

    @property
    def per_s(self) -> float:
        """Current rate in units per second."""
        since_s, before = self._first_s, self._first_count
        if self._begun_s is not None:
            since_s, before = self._begun_s, 0
        elif self.count == before:
            since_s, before = self._started_s, 0
        return (self.count - before) / max(time.monotonic() - since_s, 1e-3)


class Progress:
    """Progress in `unit` from `num_done` to `total`: a bar on a terminal, a line at most every 10 s in a log."""

    def __init__(self, unit: str, total: int, num_done: int = 0) -> None:
        self.num_done = num_done
        self._unit, self._total, self._rate = unit, total, Rate()
        self._logged_s, self._note = -math.inf, ""
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn(unit),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[details]}"),
            rich_progress.TextColumn("ETA"),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=total, completed=num_done, details="starting", note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Count `count` more units and update the bar or the log."""
        self._rate.add(count)
        details = self._format_details()
        self._bar.update(self._task, advance=count, details=details, note=self._note)
        if self._bar.disable and (time.monotonic() - self._logged_s > _LOG_EVERY_S or not self._remaining):
            self._logged_s = time.monotonic()
            counts = f"{self._total - self._remaining}/{self._total} {self._unit}"
            note = f"; {self._note}" if self._note else ""
            print(f"{counts}, {details}, ETA {self._format_eta()}{note}", file=sys.stderr)

    @property
    def num_new(self) -> int:
        """Units counted since the start."""
        return self._rate.count

    @property
    def _eta_s(self) -> float:
        return self._remaining / max(self._rate.per_s, 1e-6)

    @property
    def _remaining(self) -> int:
        return self._total - self.num_done - self.num_new

    def _format_details(self) -> str:
        return f"{self._rate.per_s:.1f} {self._unit.split()[0]}/s"

    def _format_eta(self) -> str:
        hours, rest_s = divmod(round(self._eta_s), 3600)
        return f"{hours}:{rest_s // 60:02}:{rest_s % 60:02}"


class RunProgress(Progress):
    """Progress of a run in rows, with errors and output tokens; `num_done` rows were finished by earlier runs."""

    def __init__(self, num_rows: int, num_done: int) -> None:
        super().__init__("rows", num_rows, num_done)
        self._tokens, self._num_errors = Rate(), 0

    def begin(self, seconds_ago: float) -> None:
        """Count rates from then on, because the first replica got rows."""
        self._rate.begin(seconds_ago)
        self._tokens.begin(seconds_ago)

    def note_limit(self, limit: Limit) -> None:
        """Show what limits the run from the next line on."""
        self._note = f"limited by: {limit.line}"

    def describe(self) -> dict[str, Any]:
        """Return counts, rates and the remaining time as in progress.json; errors and rates are of this run only."""
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": self._total,
            "done": self._total - self._remaining,
            "errors": self._num_errors,
            "output_tokens": self.num_tokens,
            "rows_per_s": round(self._rate.per_s, 3),
            "output_tokens_per_s": round(self._tokens.per_s, 3),
            "eta_s": round(self._eta_s, 1) if self.num_new else None,
        }

    def add(self, results: pa.Table) -> None:
        """Count rows of the result schema."""
        self._num_errors += pc.sum(pc.equal(results.column("status"), "error")).as_py() or 0
        self._tokens.add(pc.sum(results.column("num_output_tokens")).as_py() or 0)
        self.advance(len(results))

    @property
    def num_tokens(self) -> int:
        """Output tokens since the start."""
        return self._tokens.count

    def _format_details(self) -> str:
        errors = f", {count_nouns(self._num_errors, 'error')}" if self._num_errors else ""
        return f"{super()._format_details()}, {self._tokens.per_s:.0f} tokens/s{errors}"
