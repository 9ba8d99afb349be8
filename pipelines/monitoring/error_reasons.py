"""Count the reasons of failed rows, and stop a run in which everything fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ovis_model.wording import count_nouns
from pipelines.errors import EverythingFails
from pipelines.monitoring.top_counts import MAX_KEY_CHARACTERS, TopCounts

_MIN_ROWS = 500  # before the error rate counts: seconds of work, and no small input is ever stopped early
_MAX_EXAMPLES = 10_000
_SEPARATOR = ": "
# Numbers, and quoted text or bytes: what differs between rows with the same reason.
_VARIABLE = re.compile(r"""(?<!\w)b?'(?:[^'\\]|\\.)*'(?!\w)|(?<!\w)b?"(?:[^"\\]|\\.)*"(?!\w)|\d[\d,._]*""")

logger = logging.getLogger(__name__)


def normalize_reason(stage: str, error: str) -> str:
    """Return the key of an error row's group: reasons that differ only in numbers or quoted text share a group."""
    return _VARIABLE.sub(_generalize, f"{stage}{_SEPARATOR}{error}")[:MAX_KEY_CHARACTERS]


def _generalize(match: re.Match[str]) -> str:
    return "0" if match[0][0].isdigit() else "'...'"


@dataclass(frozen=True)
class ReasonCount:
    """The size of a group of error rows; `stage` and `reason` come from the group's first row."""

    key: str
    stage: str
    reason: str
    count: int


class ReasonCounts:
    """Counts error rows by stage and reason, in the bounded memory of `counts`."""

    def __init__(self) -> None:
        self.counts = TopCounts()
        self._examples: dict[str, tuple[str, str]] = {}

    def add(self, stages: Iterable[str], errors: Iterable[str]) -> None:
        """Count error rows, given as one stage and one error message per row."""
        for stage, error in zip(stages, errors, strict=True):
            key = normalize_reason(stage, error)
            self.counts.add_key(key)
            if len(self._examples) < _MAX_EXAMPLES:
                self._examples.setdefault(key, (stage, error))

    def list_top(self, limit: int) -> list[ReasonCount]:
        """Return up to `limit` groups, the most frequent first."""
        return [ReasonCount(key, *self._get_get_example(key), count) for key, count in self.counts.list_top(limit)]

    def _get_get_example(self, key: str) -> tuple[str, str]:
        stage, _, reason = key.partition(_SEPARATOR)
        return self._examples.get(key, (stage, reason))


class ErrorMonitor:
    """Counts the error rows of this driver, logs their reasons at exit and stops a run in which too many rows fail.

    stop_error_rate: share of error rows above which the run stops.
    """

    def __init__(self, stop_error_rate: float) -> None:
        self._stop_error_rate = stop_error_rate
        self._reasons = ReasonCounts()
        self._num_rows = 0

    def __enter__(self) -> ErrorMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.log()

    def log(self, limit: int = 10) -> None:
        """Log the most frequent reasons with their counts."""
        if self._num_errors:
            logger.warning("%s. The most frequent reasons:", count_nouns(self._num_errors, "error row"))
        for reason in self._reasons.list_top(limit):
            logger.warning("  %d x %s: %s", reason.count, reason.stage, reason.reason)

    def add(self, results: pa.Table) -> None:
        """Count rows of the result schema. Raise EverythingFails if too many of all rows so far are errors."""
        errors = results.filter(pc.equal(results.column("status"), "error"))
        self._num_rows += len(results)
        self._reasons.add(errors.column("stage").to_pylist(), errors.column("error").to_pylist())
        if self._num_rows >= _MIN_ROWS and self._num_errors > self._stop_error_rate * self._num_rows:
            raise EverythingFails(
                f"{self._num_errors} of the first {self._num_rows} rows are errors; see their reasons above. "
                "Fix the cause and run the same command with --retry-errors to retry them and resume. "
                "To continue regardless of errors, add --stop-error-rate 1"
            )

    @property
    def _num_errors(self) -> int:
        return self._reasons.counts.total
