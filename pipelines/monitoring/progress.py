"""How far a run is and when it will end, on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LOG_EVERY_S = 10.0


class RunProgress:
    """Counts rows of one run. `num_done` were done before it."""

    def __init__(self, num_rows: int, num_done: int) -> None:
        self.num_rows, self.num_done, self.num_new, self.num_errors, self.num_tokens = (
            num_rows,
            num_done,
            0,
            0,
            0,
        )
        self._started_s, self._logged_s = time.monotonic(), -math.inf
        self._warm_up: tuple[float, int, int] | None = None  # when the first rows came, how many, of how many tokens
        self._bar = Progress(
            TextColumn("captioning"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=num_rows, completed=num_done, rate="starting")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, results: pa.Table) -> None:
        """Count rows of `schema.result`."""
        rows, tokens = len(results), pc.sum(results.column("num_output_tokens")).as_py() or 0
        if self._warm_up is None:
            self._warm_up = (time.monotonic(), rows, tokens)
        self.num_new += rows
        self.num_errors += pc.sum(pc.equal(results.column("status"), "error")).as_py() or 0
        self.num_tokens += tokens
        self._bar.update(self._task, advance=rows, rate=self._rates())
        if self._bar.disable and (time.monotonic() - self._logged_s > _LOG_EVERY_S or self._is_complete()):
            self._logged_s = time.monotonic()
            print(f"{self._done()}/{self.num_rows} rows, {self._rates()}, ETA {self._eta()}", file=sys.stderr)

    def _done(self) -> int:
        return self.num_done + self.num_new

    def _is_complete(self) -> bool:
        return self._done() == self.num_rows

    def _rates(self) -> str:
        errors = f", {self.num_errors} errors" if self.num_errors else ""
        rows_per_s, tokens_per_s = self._per_s()
        return f"{rows_per_s:.1f} rows/s, {tokens_per_s:.0f} tokens/s{errors}"

    def _per_s(self) -> tuple[float, float]:
        """Rows and tokens a second, without the start and what came at its end as soon as there is more."""
        since_s, rows, tokens = self._warm_up or (self._started_s, 0, 0)
        if self.num_new == rows:
            since_s, rows, tokens = self._started_s, 0, 0
        elapsed_s = max(time.monotonic() - since_s, 1e-3)
        return (self.num_new - rows) / elapsed_s, (self.num_tokens - tokens) / elapsed_s

    def _eta(self) -> str:
        remaining_s = (self.num_rows - self._done()) / max(self._per_s()[0], 1e-6)
        hours, rest_s = divmod(round(remaining_s), 3600)
        return f"{hours}:{rest_s // 60:02}:{rest_s % 60:02}"
