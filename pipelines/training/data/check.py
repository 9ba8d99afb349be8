"""Prepare every row once before the training starts: its length for the order, or the reason why it is left out.

What a row teaches is then known before a step is spent on it, and no bad row reaches a batch.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from ovis_model.training.examples import PreferenceExample
from pipelines.cluster.actor import register_fast_exit
from pipelines.cluster.ray_session import translate_ray_errors
from pipelines.config import ImageOptions
from pipelines.errors import RowError
from pipelines.monitoring.progress import Progress
from pipelines.output.ledger import RowRange
from pipelines.storage import store
from pipelines.training.data.order import Rows
from pipelines.training.data.prepare import AnyExample, ExamplePreparer, count_tokens
from pipelines.training.data.row_table import RowTable

_MAX_ROWS_PER_TASK = 256
_TASKS_PER_CHECKER = 8  # so that all checkers end at about the same time
_CHECKED = pa.schema(
    {
        "row": pa.int64(),
        "data_set": pa.int32(),
        "num_tokens": pa.int64(),
        "num_tiles": pa.int64(),
        "stage": pa.string(),
        "error": pa.string(),
    }
)
_WRONG_KIND = {
    True: "the row is a dialogue, not a pair; --stage dpo needs chosen and rejected answers",
    False: "the row is a pair of answers; train on it with --stage dpo",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareOptions:
    """What decides the examples of rows; `is_preference` asks for pairs."""

    model: str
    revision: str | None
    images: ImageOptions
    max_length: int | None
    is_preference: bool
    allow_private_addresses: bool

    def make_preparer(self) -> ExamplePreparer:
        """Return a preparer for this process."""
        store.allow_private_addresses(self.allow_private_addresses)
        return ExamplePreparer(self.model, self.revision, self.images, self.max_length)


class CheckedRow(NamedTuple):
    """What is known of a row: its number of tokens, or the stage and the error that it fails with."""

    row: int
    data_set: int
    num_tokens: int
    num_tiles: int = 0
    stage: str = ""
    error: str = ""


@dataclass(frozen=True, eq=False)
class CheckedRows:
    """All rows of a run, in order."""

    table: pa.Table

    @property
    def good(self) -> Rows:
        """The numbers of the rows that have an example."""
        return np.flatnonzero(self.table.column("num_tokens").to_numpy() > 0)

    @property
    def num_errors(self) -> int:
        """The number of the other rows."""
        return len(self.table) - len(self.good)

    def is_of_first(self, num_data_sets: int) -> NDArray[np.bool_]:
        """Return for each good row whether it is of one of the first so many data sets: the others are held out."""
        return np.asarray(self.get_data_sets()[self.good] < num_data_sets)

    def get_lengths(self) -> Rows:
        """Return the number of tokens of each row; 0 for an error."""
        return np.asarray(self.table.column("num_tokens").to_numpy())

    def get_data_sets(self) -> Rows:
        """Return the number of each row's data set."""
        return np.asarray(self.table.column("data_set").to_numpy(), np.int64)

    def measure_largest(self, num_rows: int, *, answers: int) -> tuple[int, int]:
        """Return the tokens and the tiles of the largest micro-batch of `num_rows`, each with so many answers."""
        tokens, tiles = (
            np.sort(self.table.column(name).to_numpy())[-num_rows:] for name in ("num_tokens", "num_tiles")
        )
        return answers * int(tokens.sum()), int(tiles.sum())

    def describe_errors(self, count: int = 5) -> str:
        """Return the most frequent reasons with their numbers."""
        errors = self.table.column("error").filter(pa.compute.equal(self.table.column("num_tokens"), 0))
        reasons = Counter(errors.to_pylist())
        return "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common(count))


def check_rows(output: str, num_rows: int, options: PrepareOptions, num_cpus: int) -> CheckedRows:
    """Prepare all rows on the cluster; write OUTPUT/checked.parquet and OUTPUT/errors.jsonl.

    A file that kills its process is found by halving: it becomes an error row. Raise StoreFault or StageFailed.
    """
    tables = []
    with translate_ray_errors(), Progress("rows checked", num_rows) as progress:
        for rows in _CheckerPool(output, num_rows, options, num_cpus).check_all():
            tables.append(pa.Table.from_pylist([row._asdict() for row in rows], _CHECKED))
            progress.advance(len(rows))
    table = pa.concat_tables(tables).sort_by("row")
    _write(output, num_rows, table)
    return CheckedRows(table)


def read_checked_rows(output: str) -> CheckedRows:
    """Return the result of an earlier check. Raise OSError."""
    return CheckedRows(store.read_parquet(_locate(output)))


class RowChecker:
    """Prepares ranges of rows, in a Ray actor or in this process."""

    def __init__(self, output: str, num_rows: int, options: PrepareOptions) -> None:
        """Map the rows and load the tokenizer."""
        register_fast_exit()
        self._table = RowTable(output, num_rows)
        self._preparer, self._is_preference = options.make_preparer(), options.is_preference

    def check(self, rows: RowRange) -> list[CheckedRow]:
        """Return what is known of each row. Raise StoreFault."""
        listed = {number: self._table.get(number) for number in range(*rows)}
        good = {number: row.dialogue for number, row in listed.items() if row.dialogue is not None}
        found = [
            CheckedRow(number, row.data_set, 0, 0, "list", row.error)
            for number, row in listed.items()
            if number not in good
        ]
        for number, (example, error) in zip(good, self._preparer.prepare(good.values()), strict=True):
            found.append(_describe_example(number, listed[number].data_set, example, error, self._is_preference))
        return found


def _describe_example(
    number: int, data_set: int, example: AnyExample | None, error: RowError | None, is_preference: bool
) -> CheckedRow:
    error = error or _find_wrong_kind(example, is_preference)
    if error or example is None:
        return CheckedRow(number, data_set, 0, 0, error.stage if error else "tile", str(error))
    return CheckedRow(number, data_set, count_tokens(example), len(example.tiles))


def _find_wrong_kind(example: AnyExample | None, is_preference: bool) -> RowError | None:
    is_pair = isinstance(example, PreferenceExample)
    return None if is_pair == is_preference else RowError("list", _WRONG_KIND[is_preference])


class _CheckerPool:
    """Checkers in Ray actors, one per CPU; one that dies is replaced, and its range is cut in halves."""

    def __init__(self, output: str, num_rows: int, options: PrepareOptions, num_cpus: int) -> None:
        self._arguments = output, num_rows, options
        per_task = max(1, min(_MAX_ROWS_PER_TASK, num_rows // (num_cpus * _TASKS_PER_CHECKER)))
        self._waiting = [RowRange(at, min(at + per_task, num_rows)) for at in range(0, num_rows, per_task)][::-1]
        self._num_actors = min(num_cpus, len(self._waiting))

    def check_all(self) -> Iterator[list[CheckedRow]]:
        """Yield the rows of each range, in any order. Raise what a checker raises."""
        import ray

        running: dict[Any, tuple[Any, RowRange]] = {}
        idle = [self._start_actor() for _ in range(self._num_actors)]
        while self._waiting or running:
            while self._waiting and idle:
                checker, rows = idle.pop(), self._waiting.pop()
                running[checker.check.remote(rows)] = checker, rows
            [done], _ = ray.wait(list(running))
            checker, rows = running.pop(done)
            try:
                yield ray.get(done)
                idle.append(checker)
            except ray.exceptions.RayActorError:
                idle.append(self._start_actor())
                if rows.stop - rows.start == 1:
                    yield [CheckedRow(rows.start, 0, 0, 0, "decode", "the process died when it prepared the row")]
                self._waiting += _halve(rows)

    def _start_actor(self) -> Any:
        import ray

        return ray.remote(RowChecker).options(num_cpus=1).remote(*self._arguments)


def _halve(rows: RowRange) -> Sequence[RowRange]:
    middle = (rows.start + rows.stop) // 2
    return [RowRange(rows.start, middle), RowRange(middle, rows.stop)] if rows.start < middle else []


def _write(output: str, num_rows: int, table: pa.Table) -> None:
    errors = table.filter(pa.compute.greater(pa.compute.utf8_length(table.column("error")), 0))
    with RowTable(output, num_rows) as rows:
        lines = [json.dumps(_describe(rows, error), ensure_ascii=False) for error in errors.to_pylist()]
    store.write_bytes(store.join(output, "errors.jsonl"), "".join(f"{line}\n" for line in lines).encode())
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    store.write_bytes(_locate(output), sink.getvalue().to_pybytes())


def _describe(rows: RowTable, error: dict[str, Any]) -> dict[str, Any]:
    listed = rows.get(error["row"])
    media = [store.redact(reference.uri) for reference in listed.dialogue.media] if listed.dialogue else []
    place = {"row": error["row"], "file": store.redact(listed.uri), "place": listed.place, "media": media}
    return {**place, "stage": error["stage"], "error": error["error"]}


def _locate(output: str) -> str:
    return store.join(output, "checked.parquet")
