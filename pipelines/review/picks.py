"""Pick answers for a person to look at: uncertain ones, flagged ones, at random, or evenly over a column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from pipelines.output.ledger import read_entries
from pipelines.report.answers import Answers
from pipelines.report.columns import OutputColumns, TaskColumns
from pipelines.report.sample import hash_row_numbers
from pipelines.storage import store

Pick = Literal["uncertain", "flagged", "random"]


@dataclass(frozen=True)
class PickedAnswer:
    """An answer to review. `order`: answers with a lower one come first; `stratum`: the value of the column."""

    row: int
    id: str
    task: TaskColumns
    text: str
    confidence: float
    stratum: str
    order: float


def pick_answers(
    output: str, columns: OutputColumns, tasks: Sequence[str], pick: Pick, by: str | None, max_answers: int
) -> list[PickedAnswer]:
    """Return the answers to review. Raise ValueError if a task or the column does not exist."""
    names = [task.name for task in columns.tasks]
    if unknown := sorted(set(tasks) - set(names)):
        raise ValueError(f"--task names {', '.join(unknown)}; the tasks are {', '.join(names)}")
    if by and by not in columns.names:
        raise ValueError(f"--by {by!r} is no column that can be shown; there are {', '.join(columns.names)}")
    wanted = [task for task in columns.tasks if not tasks or task.name in tasks]
    found = sorted(_list_answers(output, columns, wanted, pick, by), key=lambda answer: (answer.order, answer.row))
    strata: dict[str, list[PickedAnswer]] = {}
    for answer in found:
        strata.setdefault(answer.stratum, []).append(answer)
    rounds = zip_longest(*strata.values())  # the first of each stratum, then the second of each ...
    return [answer for one_each in rounds for answer in one_each if answer is not None][:max_answers]


def _list_answers(
    output: str, columns: OutputColumns, tasks: Sequence[TaskColumns], pick: Pick, by: str | None
) -> Iterator[PickedAnswer]:
    for info, entry in read_entries(store.join(output, "data")):
        with store.open_file(info.uri) as file:
            at = 0
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(4096, columns=columns.names):
                answers = Answers(columns, entry.rows[at : at + len(batch)], batch)
                yield from _list_batch(answers, tasks, pick, by)
                at += len(batch)


def _list_batch(answers: Answers, tasks: Sequence[TaskColumns], pick: Pick, by: str | None) -> Iterator[PickedAnswer]:
    chance = hash_row_numbers(answers.rows).astype(np.float64)
    strata: list[Any] = answers.get_column(by).to_pylist() if by else [""] * len(answers.rows)
    ids, flags = answers.get_column("id").to_pylist(), answers.flags.to_pylist()
    for task in tasks:
        texts, confidence = answers.get_column(task.text).to_pylist(), answers.confidence[task.name]
        order = np.nan_to_num(confidence, nan=-1.0) if pick == "uncertain" else chance
        for place in np.flatnonzero(answers.is_ok).tolist():
            if pick == "flagged" and not any(flag.startswith(f"{task.name}:") for flag in flags[place] or ()):
                continue
            yield PickedAnswer(
                row=int(answers.rows[place]),
                id=ids[place],
                task=task,
                text=texts[place],
                confidence=float(confidence[place]),
                stratum=str(strata[place]),
                order=float(order[place]),
            )
