"""Derive confidence, flags and correctness for some rows of an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.report.columns import CAPTION, Kind, OutputColumns, TaskColumns

_YES, _NO = ["yes", "true", "1"], ["no", "false", "0"]


@dataclass(frozen=True)
class Answers:
    """Rows of an output: `rows` int64[N] their numbers, `batch` their columns. What is derived is in the same order."""

    columns: OutputColumns
    rows: NDArray[np.int64]
    batch: pa.RecordBatch

    def get_column(self, name: str) -> pa.Array:
        return self.batch.column(name)

    @cached_property
    def is_ok(self) -> NDArray[np.bool_]:
        return to_mask(pc.equal(self.get_column("status"), "ok"))

    def list_failures(self) -> tuple[list[str], list[str]]:
        """Return stage and error of each row that is not ok."""
        failed = ~self.is_ok
        return self.get_column("stage").filter(failed).to_pylist(), self.get_column("error").filter(failed).to_pylist()

    @cached_property
    def confidence(self) -> Mapping[str, NDArray[np.float64]]:
        """Task -> float64[N]: the probability of the choice, else of a token (geometric mean); NaN: there is none."""
        return {task.name: self._compute_confidence(task) for task in self.columns.tasks}

    @cached_property
    def flags(self) -> pa.ListArray:
        """Of "task:flag". A captioning run has no such column: there, what is cut off and what is empty."""
        if self.columns.has_flags:
            return self.get_column("flags")
        is_cut = to_mask(pc.equal(self.get_column("finish_reason"), "length"))
        is_empty = self.is_ok & to_mask(pc.equal(pc.utf8_trim_whitespace(self.get_column("text")), ""))
        marks = np.stack((is_cut & self.is_ok, is_empty), axis=1)
        names = np.array([f"{CAPTION}:truncated", f"{CAPTION}:empty"])[np.nonzero(marks)[1]]
        offsets = np.concatenate(([0], marks.sum(axis=1).cumsum()))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(names.tolist(), pa.string()))

    @cached_property
    def answer_texts(self) -> Mapping[str, pa.Array]:
        """Task -> its answers as text, of the tasks whose truth is known."""
        return {
            task.name: normalize_answers(task.kind, self.get_column(task.value))
            for task in self.columns.tasks
            if task.truth
        }

    @cached_property
    def truth_texts(self) -> Mapping[str, pa.Array]:
        """Task -> what is right, as text; null where nobody says."""
        return {
            task.name: normalize_answers(task.kind, self.get_column(task.truth))
            for task in self.columns.tasks
            if task.truth
        }

    @cached_property
    def is_wrong(self) -> Mapping[str, NDArray[np.bool_]]:
        """Task -> bool[N]: there is an answer and another truth."""
        differs = {name: pc.not_equal(self.answer_texts[name], truth) for name, truth in self.truth_texts.items()}
        return {name: to_mask(mask) & self.is_ok for name, mask in differs.items()}

    def _compute_confidence(self, task: TaskColumns) -> NDArray[np.float64]:
        column = self.get_column(task.confidence)
        if not task.choices:
            return np.asarray(np.exp(to_floats(column)))
        of_choices = np.stack([to_floats(child) for child in column.flatten()], axis=1)
        names = pa.array(task.choices)
        chosen = pc.fill_null(
            pc.index_in(normalize_answers(task.kind, self.get_column(task.value)), names), -1
        ).to_numpy()
        probability = of_choices[np.arange(len(chosen)), chosen]
        return np.where(chosen < 0, np.nan, probability)


def normalize_answers(kind: Kind, values: pa.Array) -> pa.Array:
    """Answers, or what is right, in one form for both. Raises ValueError for what cannot be an answer of this kind."""
    if kind == "bool":
        return _to_yes_or_no(values)
    if kind == "int":
        return values.cast(pa.int64()).cast(pa.string())
    if pa.types.is_nested(values.type):
        raise ValueError("--truth compares single values; a task that answers with a list or a record has none")
    return pc.utf8_trim_whitespace(values.cast(pa.string()))


def _to_yes_or_no(values: pa.Array) -> pa.Array:
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "Yes", "No")
    text = pc.utf8_lower(pc.utf8_trim_whitespace(values.cast(pa.string())))
    return pc.if_else(pc.is_in(text, pa.array(_YES)), "Yes", pc.if_else(pc.is_in(text, pa.array(_NO)), "No", text))


def to_mask(values: pa.Array) -> NDArray[np.bool_]:
    """bool[N]; null is False."""
    return np.asarray(pc.fill_null(values, False), np.bool_)


def to_floats(values: pa.Array) -> NDArray[np.float64]:
    """float64[N]; null is NaN."""
    return np.asarray(pc.fill_null(values.cast(pa.float64()), np.nan), np.float64)


def to_ints(values: pa.Array) -> NDArray[np.int64]:
    """int64 of those that are not null."""
    return np.asarray(values.drop_null().cast(pa.int64()), np.int64)


def to_keys(kind: Kind, values: pa.Array) -> pa.Array:
    """What is counted of single answers: as `normalize_answers`, but text as it is."""
    return normalize_answers(kind, values) if kind in ("bool", "int") else values.cast(pa.string())
