"""Derive confidence, flags and correctness for a batch of output rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """A batch of output rows. All derived values are in the order of the rows.

    rows: int64[N], their row numbers.
    batch: their columns.
    """

    columns: OutputColumns
    rows: NDArray[np.int64]
    batch: pa.RecordBatch

    def get_column(self, name: str) -> pa.Array:
        """Return one column of the batch by name. Probabilities of many choices are a struct here too."""
        column = self.batch.column(name)
        is_listed = pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type)
        task = next((task for task in self.columns.tasks if is_listed and task.confidence == name), None)
        return column if task is None else spread_choices(column, task.choices)

    @cached_property
    def is_ok(self) -> NDArray[np.bool_]:
        """bool[N]: the row has the status `ok`."""
        return to_mask(pc.equal(self.get_column("status"), "ok"))

    def list_failures(self) -> tuple[list[str], list[str]]:
        """Return the stages and the error messages of the rows that failed."""
        failed = ~self.is_ok
        return self.get_column("stage").filter(failed).to_pylist(), self.get_column("error").filter(failed).to_pylist()

    @cached_property
    def confidence(self) -> Mapping[str, NDArray[np.float64]]:
        """Task -> float64[N]: probability of the choice, else geometric mean over tokens; NaN without an answer."""
        return {task.name: self._compute_confidence(task) for task in self.columns.tasks}

    @cached_property
    def flags(self) -> pa.ListArray:
        """Lists of "task:flag". For a captioning run, which has no such column: truncated and empty captions."""
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
        """Task -> its answers as normalized text, for the tasks with a truth."""
        return {
            task.name: normalize_answers(task.kind, self.get_column(task.value))
            for task in self.columns.tasks
            if task.truth
        }

    @cached_property
    def truth_texts(self) -> Mapping[str, pa.Array]:
        """Task -> its truth as normalized text; null where the truth is unknown."""
        return {
            task.name: normalize_answers(task.kind, self.get_column(task.truth))
            for task in self.columns.tasks
            if task.truth
        }

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """float64[N]: what the answers score, NaN for a row that has no score of its own."""
        known = self.columns.scores
        return np.array([known.get(name, np.nan) for name in self.get_column("id").to_pylist()], np.float64)

    @cached_property
    def is_wrong(self) -> Mapping[str, NDArray[np.bool_]]:
        """Task -> bool[N]: the answer and the truth are known and differ, or the answer scores nothing."""
        if self.columns.scores:
            return dict.fromkeys(self.truth_texts, (self.scores <= 0) & self.is_ok)
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


def spread_choices(column: pa.ListArray, choices: Sequence[str]) -> pa.StructArray:
    """Convert lists of (choice, p), each in the order of `choices`, to a struct with a field per choice."""
    is_known = to_mask(pc.is_valid(column))
    table = np.full((len(column), len(choices)), np.nan)
    table[is_known] = to_floats(column.flatten().field("p")).reshape(-1, len(choices))
    return pa.StructArray.from_arrays([*map(pa.array, table.T)], list(choices), mask=pa.array(~is_known))


def normalize_answers(kind: Kind, values: pa.Array) -> pa.Array:
    """Convert answers or truths to text that can be compared. Raise ValueError if a value does not fit the kind."""
    if kind == "bool":
        return _format_yes_no(values)
    if kind in ("int", "float"):
        return values.cast(pa.int64() if kind == "int" else pa.float64()).cast(pa.string())
    if pa.types.is_nested(values.type):
        raise ValueError("--truth compares single values; tasks whose answers are lists or records cannot have one")
    return pc.utf8_trim_whitespace(values.cast(pa.string()))


def _format_yes_no(values: pa.Array) -> pa.Array:
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "Yes", "No")
    text = pc.utf8_lower(pc.utf8_trim_whitespace(values.cast(pa.string())))
    return pc.if_else(pc.is_in(text, pa.array(_YES)), "Yes", pc.if_else(pc.is_in(text, pa.array(_NO)), "No", text))


def to_mask(values: pa.Array) -> NDArray[np.bool_]:
    """Convert to bool[N], null to False."""
    return np.asarray(pc.fill_null(values, False), np.bool_)


def to_floats(values: pa.Array) -> NDArray[np.float64]:
    """Convert to float64[N], null to NaN."""
    return np.asarray(pc.fill_null(values.cast(pa.float64()), np.nan), np.float64)


def to_ints(values: pa.Array) -> NDArray[np.int64]:
    """Convert the non-null values to int64."""
    return np.asarray(values.drop_null().cast(pa.int64()), np.int64)


def to_keys(kind: Kind, values: pa.Array) -> pa.Array:
    """Convert single answers to the text to count: as `normalize_answers`, but leave text unchanged."""
    return normalize_answers(kind, values) if kind in ("bool", "int", "float") else values.cast(pa.string())
