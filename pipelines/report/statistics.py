"""Aggregate statistics over all rows, batch by batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.monitoring.error_reasons import ReasonCounts
from pipelines.monitoring.top_counts import TopCounts
from pipelines.report.answers import Answers, to_floats, to_ints, to_keys, to_mask
from pipelines.report.columns import COUNTS, OutputColumns, TaskColumns
from pipelines.report.counts import Calibration, Histogram, NumberHistogram, Spread

Json = dict[str, Any]

SHOWN_VALUES = 40  # per task, most frequent first
_MAX_BARS = 24  # of numbers; more of them are a histogram
_SHOWN_REASONS = 100
_SHOWN_FIELD_VALUES, _MAX_FIELD_VALUES = 5, 500
_LOWEST_LOGPROB = -4.0  # of the histogram: a token's probability of 2 %
_LOGPROB_STEPS = 1000  # per unit of log-probability
_COUNTABLE = (pa.types.is_string, pa.types.is_boolean, pa.types.is_integer)


class RunStatistics:
    """Statistics of a whole run, added up batch by batch."""

    def __init__(self, columns: OutputColumns) -> None:
        self._columns = columns
        self._tasks = [_TaskStatistics(task) for task in columns.tasks]
        self._rows = self._flagged = 0
        self._sums: Counter[str] = Counter()
        self._tokens, self._flags, self._reasons = Spread(), TopCounts(), ReasonCounts()
        self._categories = {name: _Category() for name in columns.categories}

    def add(self, answers: Answers) -> None:
        """Count a batch of rows."""
        self._rows += len(answers.rows)
        self._reasons.add(*answers.list_failures())
        self._flagged += int(to_mask(pc.greater(pc.list_value_length(answers.flags), 0)).sum())
        self._flags.add(answers.flags.flatten())
        for name in COUNTS:
            self._sums[name] += pc.sum(answers.get_column(name)).as_py() or 0
        self._tokens.add(to_ints(answers.get_column("num_output_tokens").filter(answers.is_ok)))
        for task in self._tasks:
            task.add(answers)
        for name, category in self._categories.items():
            category.add(answers.get_column(name), answers.scores)

    def to_json(self) -> Json:
        """Return the statistics as the page reads them."""
        num_errors = self._reasons.counts.total
        reasons = [asdict(reason) for reason in self._reasons.list_top(_SHOWN_REASONS)]
        return {
            "rows": self._rows,
            "ok": self._rows - num_errors,
            "error": num_errors,
            "flagged": self._flagged,
            **self._sums,
            "tokens": self._tokens.to_json(),
            "flags": self._flags.to_json(_SHOWN_REASONS),
            "reasons": {**self._reasons.counts.to_json(_SHOWN_REASONS), "top": reasons},
            "tasks": [task.to_json() for task in self._tasks],
            "categories": {name: category.to_json() for name, category in self._categories.items()},
        }


class _Category:
    """The sum of scores and the number of scored rows, for each value of a column."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def add(self, values: pa.Array, scores: NDArray[np.float64]) -> None:
        for value, score in zip(values.cast(pa.string()).to_pylist(), scores.tolist(), strict=True):
            if value is not None and score == score:
                self._sums[value] += score
                self._counts[value] += 1

    def to_json(self) -> list[Json]:
        """Return the most frequent values, in alphabetical order."""
        shown = sorted(value for value, _ in self._counts.most_common(SHOWN_VALUES))
        return [{"value": value, "score": self._sums[value], "count": self._counts[value]} for value in shown]


class _TaskStatistics:
    def __init__(self, task: TaskColumns) -> None:
        self._task = task
        self._answered = self._unanswered = 0
        self._finish: Counter[str] = Counter()
        self._values, self._list_lengths, self._fields = TopCounts(), Spread(), _Fields()
        self._lengths, self._numbers = Spread(), NumberHistogram(is_whole=task.kind == "int")
        self._probability, self._surprise = Histogram(num_bins=20, width=0.05), Spread()
        self._truth = _Truth()

    def add(self, answers: Answers) -> None:
        task, ok = self._task, answers.is_ok
        values = answers.get_column(task.value).filter(ok)
        self._answered += len(values) - values.null_count
        self._unanswered += values.null_count
        for pair in answers.get_column(task.finish_reason).filter(ok).value_counts().to_pylist():
            self._finish[pair["values"] or ""] += pair["counts"]
        self._lengths.add(to_ints(pc.utf8_length(answers.get_column(task.text).filter(ok))))
        if task.choices:
            self._probability.add(answers.confidence[task.name][ok])
        else:
            self._add_logprobs(to_floats(answers.get_column(task.confidence))[ok])
        self._add_values(values)
        if task.truth:
            self._truth.add(answers, task.name)

    def _add_logprobs(self, logprobs: NDArray[np.float64]) -> None:
        """Count the negated values in steps of 0.001: a confident model's lie within 0.1, others' within several."""
        known = np.clip(logprobs[~np.isnan(logprobs)], _LOWEST_LOGPROB, 0)
        self._surprise.add(np.rint(-_LOGPROB_STEPS * known).astype(np.int64))

    def _add_values(self, values: pa.Array) -> None:
        match self._task.kind:
            case "list":
                self._values.add(values.flatten())
                self._list_lengths.add(to_ints(pc.list_value_length(values)))
            case "record":
                self._fields.add(values)
            case kind:
                self._values.add(to_keys(kind, values))
                if kind in ("int", "float"):
                    self._numbers.add(to_floats(values))

    def to_json(self) -> Json:
        task = self._task
        return {
            "name": task.name,
            "kind": task.kind,
            "about": task.about,
            "choices": task.choices,
            "answered": self._answered,
            "unanswered": self._unanswered,
            "finish": dict(self._finish),
            "length": self._lengths.to_json(),
            "confidence": self._probability.to_json() if task.choices else _serialize_logprobs(self._surprise),
            "values": self._values.to_json(SHOWN_VALUES),
            "histogram": self._bin_values(),
            "list_lengths": self._list_lengths.to_json(),
            "fields": self._fields.to_json(),
            "truth": self._truth.to_json() if task.truth else None,
        }

    def _bin_values(self) -> Json | None:
        """Return the histogram of numbers with more values than there is room for bars."""
        return self._numbers.to_json() if self._values.num_kept > _MAX_BARS else None


def _serialize_logprobs(surprise: Spread) -> Json | None:
    found = surprise.to_json()
    if found is None:
        return None
    width, bins = found["width"] / _LOGPROB_STEPS, found["bins"][::-1]
    mean, smallest, largest = (-found[name] / _LOGPROB_STEPS for name in ("mean", "max", "min"))
    return {"bins": bins, "start": -len(bins) * width, "width": width, "mean": mean, "min": smallest, "max": largest}


class _Truth:
    """Accuracy and calibration of the rows that have an answer and a truth, and the most frequent mistakes."""

    def __init__(self) -> None:
        self._calibration, self._mistakes = Calibration(), TopCounts()
        self._unanswered = 0

    def add(self, answers: Answers, name: str) -> None:
        answer, truth, is_wrong = answers.answer_texts[name], answers.truth_texts[name], answers.is_wrong[name]
        is_known = answers.is_ok & to_mask(pc.is_valid(truth))
        counted = is_known & to_mask(pc.is_valid(answer)) & ~np.isnan(answers.confidence[name])
        self._unanswered += int((is_known & ~counted).sum())
        self._calibration.add(answers.confidence[name][counted], ~is_wrong[counted])
        wrong = counted & is_wrong
        for pair in zip(truth.filter(wrong).to_pylist(), answer.filter(wrong).to_pylist(), strict=True):
            self._mistakes.add_key(tuple(text[:80] for text in pair))

    def to_json(self) -> Json:
        mistakes = self._mistakes.to_json(12)
        return {**self._calibration.to_json(), "unanswered": self._unanswered, "mistakes": mistakes}


class _Fields:
    """For each field of records: how many records have it, of those that could, and its most frequent values."""

    def __init__(self) -> None:
        self._present: Counter[str] = Counter()
        self._possible: Counter[str] = Counter()
        self._values: dict[str, TopCounts] = {}

    def add(self, records: pa.Array) -> None:
        self._walk("", records.drop_null())

    def _walk(self, path: str, values: pa.Array) -> None:
        """Count non-null values at a path, and the fields or items inside them."""
        if pa.types.is_struct(values.type):
            for field, child in zip(values.type, values.flatten(), strict=True):
                self._count(f"{path}.{field.name}" if path else field.name, child)
        elif pa.types.is_list(values.type):
            self._count(f"{path}[]", values.flatten())
        elif any(is_countable(values.type) for is_countable in _COUNTABLE):
            keys = to_keys("bool" if pa.types.is_boolean(values.type) else "text", values)
            self._values.setdefault(path, TopCounts(_MAX_FIELD_VALUES)).add(keys)

    def _count(self, path: str, values: pa.Array) -> None:
        self._possible[path] += len(values)
        self._present[path] += len(values) - values.null_count
        self._walk(path, values.drop_null())

    def to_json(self) -> list[Json]:
        return [
            {
                "path": path,
                "present": self._present[path],
                "possible": possible,
                "values": self._values[path].to_json(_SHOWN_FIELD_VALUES) if path in self._values else None,
            }
            for path, possible in self._possible.items()
        ]
