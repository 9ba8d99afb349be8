"""Pick answers for a person to look at: uncertain ones, flagged ones, at random, or evenly over a column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from pipelines.report.answers import Answers
from pipelines.report.columns import TaskColumns
from pipelines.report.opened import OpenedRun
from pipelines.report.sample import hash_row_numbers

Pick = Literal["uncertain", "flagged", "random"]


@dataclass(frozen=True)
class PickedAnswer:
    """An answer to review.

    order: answers with a lower one come first. stratum: the value of the column. times_s: of the frames that the
    model saw, in seconds. question: what was asked, if it is not the task's own prompt.
    """

    row: int
    id: str
    task: TaskColumns
    text: str
    confidence: float
    stratum: str
    order: float
    times_s: tuple[float, ...]
    question: str | None = None


def pick_answers(
    run: OpenedRun, tasks: Sequence[str], pick: Pick, by: str | None, max_answers: int
) -> list[PickedAnswer]:
    """Return the answers to review. Raise ValueError if a task or the column does not exist."""
    columns = run.columns
    names = [task.name for task in columns.tasks]
    if unknown := sorted(set(tasks) - set(names)):
        raise ValueError(f"--task names {', '.join(unknown)}; the tasks are {', '.join(names)}")
    if by and by not in columns.names:
        raise ValueError(f"--by {by!r} is no column that can be shown; there are {', '.join(columns.names)}")
    wanted = [task for task in columns.tasks if not tasks or task.name in tasks]
    found = sorted(_list_answers(run, wanted, pick, by), key=lambda answer: (answer.order, answer.row))
    strata: dict[str, list[PickedAnswer]] = {}
    for answer in found:
        strata.setdefault(answer.stratum, []).append(answer)
    rounds = zip_longest(*strata.values())  # the first of each stratum, then the second of each ...
    chosen = [answer for one_each in rounds for answer in one_each if answer is not None][:max_answers]
    questions = run.read_questions([answer.row for answer in chosen])
    return [replace(answer, question=_get_question(questions.get(answer.row), names, answer)) for answer in chosen]


def _get_question(questions: Sequence[str | None] | None, names: Sequence[str], answer: PickedAnswer) -> str | None:
    return questions[names.index(answer.task.name)] if questions else None


def _list_answers(run: OpenedRun, tasks: Sequence[TaskColumns], pick: Pick, by: str | None) -> Iterator[PickedAnswer]:
    for rows, batch in run.read_batches(run.columns.names):
        yield from _list_batch(Answers(run.columns, rows, batch), tasks, pick, by)


def _list_batch(answers: Answers, tasks: Sequence[TaskColumns], pick: Pick, by: str | None) -> Iterator[PickedAnswer]:
    chance = hash_row_numbers(answers.rows).astype(np.float64)
    strata: list[Any] = answers.get_column(by).to_pylist() if by else [""] * len(answers.rows)
    ids, flags = answers.get_column("id").to_pylist(), answers.flags.to_pylist()
    times_s = answers.get_column("frame_timestamps_s").to_pylist()
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
                times_s=tuple(times_s[place] or ()),
            )
