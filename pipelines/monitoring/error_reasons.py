"""Why rows failed: the most frequent reasons, and an end to a run in which everything does."""

from __future__ import annotations

import logging
import re
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import EverythingFails

FEWEST_ROWS = 500  # before a run is judged: seconds of work, and no small input is ever cut short
_MOST_REASONS = 10_000
_NUMBER = re.compile(r"\d[\d,._]*")

logger = logging.getLogger(__name__)


def kind_of(reason: str) -> str:
    """The same for reasons that differ in their numbers only."""
    return _NUMBER.sub("0", reason)


class Reasons:
    """Error rows of this driver by stage and reason. Those that differ in their numbers only count as one."""

    def __init__(self, stop_error_rate: float) -> None:
        self._stop_error_rate = stop_error_rate
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._num_rows = self._num_errors = 0

    def __enter__(self) -> Reasons:
        return self

    def __exit__(self, *exception: object) -> None:
        self.log()

    def add(self, results: pa.Table) -> None:
        """Rows of `schema.result`. Raises EverythingFails."""
        errors = results.filter(pc.equal(results.column("status"), "error"))
        self._num_rows += len(results)
        self._num_errors += len(errors)
        for stage, error in zip(errors.column("stage").to_pylist(), errors.column("error").to_pylist(), strict=True):
            self._count(f"{stage}: {error}")
        self._check()

    def _count(self, reason: str) -> None:
        kind = kind_of(reason)
        if kind in self._counts or len(self._counts) < _MOST_REASONS:
            self._counts[kind] += 1
            self._examples.setdefault(kind, reason)

    def _check(self) -> None:
        if self._num_rows >= FEWEST_ROWS and self._num_errors > self._stop_error_rate * self._num_rows:
            raise EverythingFails(
                f"{self._num_errors} of the first {self._num_rows} rows are errors, see their reasons above. "
                "When they are mended, the same command with --retry-errors takes them up again and goes on; "
                "--stop-error-rate 1 goes on whatever happens"
            )

    def log(self, limit: int = 10) -> None:
        if self._num_errors:
            logger.warning("%d error rows. The most frequent reasons:", self._num_errors)
        for kind, times in self._counts.most_common(limit):
            logger.warning("  %d x %s", times, self._examples[kind])
