"""Compare two runs: how often their answers to each task agree, which answers differ, and rows side by side."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import RunError
from pipelines.report.columns import OutputColumns
from pipelines.report.comparison_page import render_comparison
from pipelines.report.opened import OpenedRun, open_output
from pipelines.report.rows import get_run_name, simplify
from pipelines.report.sample import make_picked
from pipelines.report.thumbnails import read_media
from pipelines.storage import store

Json = dict[str, Any]

_MAX_PICTURE_BYTES = 6_000_000  # per run
_MAX_VALUES = 12  # per side of a table of answers
_MAX_CHARACTERS = 600
_OTHER = "(other)"
_TABLED = ("bool", "choices", "int")


@dataclass(frozen=True)
class Compared:
    """Counts of a comparison: rows of both runs, by id; rows of one only; rows that differ in any task."""

    rows: int
    only_first: int
    only_second: int
    differ: int
    shown: int
    agreement: Mapping[str, float]
    seconds: float
    report: str


@dataclass(frozen=True)
class _Row:
    """A row of one run: its number, its status, {task: answer}, and the times of the frames that the model saw."""

    number: int
    status: str
    answers: Mapping[str, Any]
    times_s: tuple[float, ...]


_Pair = tuple[_Row, _Row]


def write_comparison(first: str, second: str, to: str | None, *, max_rows: int, limit_s: float) -> Compared:
    """Write the page that compares two runs and return its figures.

    Raise RunError if one of them is no run, or if they have no task or no id in common.
    """
    started_s = time.monotonic()
    runs = open_output(first), open_output(second)
    names = get_run_name(runs[0].output), get_run_name(runs[1].output)
    tasks = [task for task in runs[0].columns.tasks if task.name in {other.name for other in runs[1].columns.tasks}]
    rows = [_read_rows(run) for run in runs]
    pairs = {name: (row, rows[1][name]) for name, row in rows[0].items() if name in rows[1]}
    if not tasks or not pairs:
        raise RunError(f"{first} and {second} have no {'id' if tasks else 'task'} in common")
    tables = [_compare_task(task.name, task.kind, pairs.values()) for task in tasks]
    different = [name for name, pair in pairs.items() if _find_differences(pair, tables)]
    shown = different[:: max(1, len(different) // max(1, max_rows))][:max_rows]
    counts = {
        "rows of both": len(pairs),
        "only in the first": len(rows[0]) - len(pairs),
        "only in the second": len(rows[1]) - len(pairs),
        "rows that differ": len(different),
    }
    page = render_comparison(
        names=names,
        figures=counts,
        tables=tables,
        rows=_serialize_rows(runs, {name: pairs[name] for name in shown}, tables, limit_s),
    )
    uri = store.make_absolute(to) if to else store.make_absolute(f"{names[0]}-{names[1]}.html")
    store.write_bytes(uri, page)
    return Compared(
        rows=counts["rows of both"],
        only_first=counts["only in the first"],
        only_second=counts["only in the second"],
        differ=counts["rows that differ"],
        shown=len(shown),
        agreement={table["task"]: table["agreement"] for table in tables},
        seconds=round(time.monotonic() - started_s, 3),
        report=uri,
    )


def _read_rows(run: OpenedRun) -> dict[str, _Row]:
    """Return {id: row} with only the columns that are compared or shown."""
    found = {}
    tasks = run.columns.tasks
    wanted = ["id", "status", "frame_timestamps_s", *dict.fromkeys(task.value for task in tasks)]
    for numbers, batch in run.read_batches(wanted):
        for number, values in zip(numbers.tolist(), batch.to_pylist(), strict=True):
            answers = {task.name: values[task.value] for task in tasks}
            times_s = tuple(values["frame_timestamps_s"] or ())
            found[values["id"]] = _Row(number, values["status"], answers, times_s)
    return found


def _compare_task(name: str, kind: str, pairs: Any) -> Json:
    """Return the agreement of a task among rows that both runs answered, and the counts of pairs of answers."""
    counts: Counter[tuple[str, str]] = Counter()
    both = agree = unanswered = 0
    for one, other in pairs:
        answers = one.answers[name], other.answers[name]
        if None in answers:
            unanswered += answers[0] is not answers[1]
            continue
        both += 1
        agree += answers[0] == answers[1]
        if kind in _TABLED:
            counts[_to_text(answers[0]), _to_text(answers[1])] += 1
    agreement = agree / both if both else float("nan")
    return {
        "task": name,
        "both": both,
        "agree": agree,
        "unanswered": unanswered,
        "agreement": round(agreement, 6) if both else None,
        "confusion": _tabulate(counts) if counts else None,
    }


def _tabulate(counts: Counter[tuple[str, str]]) -> Json:
    """Return a table of the most frequent answers: rows are the first run's, columns the second's."""
    frequent: Counter[str] = Counter()
    for pair, count in counts.items():
        for value in pair:
            frequent[value] += count
    kept = {value for value, _ in frequent.most_common(_MAX_VALUES)}
    merged: Counter[tuple[str, str]] = Counter()
    for (one, other), count in counts.items():
        merged[one if one in kept else _OTHER, other if other in kept else _OTHER] += count
    values = sorted({value for pair in merged for value in pair}, key=_sort_key)
    return {"values": values, "counts": [[merged[one, other] for other in values] for one in values]}


def _sort_key(value: str) -> tuple[bool, float, str]:
    return (value == _OTHER, float(value) if value.lstrip("-").isdecimal() else 0.0, value)


def _to_text(value: Any) -> str:
    return ("Yes" if value else "No") if isinstance(value, bool) else str(value)


def _find_differences(pair: _Pair, tables: Sequence[Json]) -> list[str]:
    one, other = pair
    return [table["task"] for table in tables if one.answers[table["task"]] != other.answers[table["task"]]]


def _serialize_rows(
    runs: tuple[OpenedRun, OpenedRun], pairs: Mapping[str, _Pair], tables: Sequence[Json], limit_s: float
) -> list[Json]:
    """Return the rows with the answers that differ, the first run's questions, and what the models saw."""
    first = {name: one for name, (one, _) in pairs.items()}
    has_other_look = runs[0].images != runs[1].images
    second = {name: two for name, (one, two) in pairs.items() if has_other_look or one.times_s != two.times_s}
    media = [_read_pictures(run, rows, limit_s) for run, rows in zip(runs, (first, second), strict=True)]
    questions = runs[0].read_questions([row.number for row in first.values()])
    asked = {name: _name_questions(runs[0].columns, questions.get(row.number, [])) for name, row in first.items()}
    return [
        {
            "id": store.redact(name),
            "media": [found[name] for found in media if name in found],
            "answers": [
                (task, asked[name].get(task), *(_shorten(row.answers[task], row.status) for row in pair))
                for task in _find_differences(pair, tables)
            ],
        }
        for name, pair in pairs.items()
    ]


def _name_questions(columns: OutputColumns, questions: Sequence[str | None]) -> dict[str, str]:
    """Return {task: its question in this row} for the questions that are not the task's own prompt."""
    pairs = zip(columns.tasks, questions, strict=False)
    return {task.name: str(simplify(question, _MAX_CHARACTERS)) for task, question in pairs if question}


def _shorten(value: Any, status: str) -> str:
    if value is None:
        return "(error)" if status == "error" else "(no answer)"
    return str(simplify(_to_text(value), _MAX_CHARACTERS))


def _read_pictures(run: OpenedRun, rows: Mapping[str, _Row], limit_s: float) -> dict[str, Json]:
    """Return {id: thumbnails}, as this run's model saw the images and videos."""
    picked = [make_picked(name, row.number, row.times_s) for name, row in rows.items()]
    picked.sort(key=lambda one: one.row)
    max_bytes = _MAX_PICTURE_BYTES // max(1, len(picked))
    media = read_media(run.manifest, picked, run.images, max_bytes=max_bytes, limit_s=limit_s)
    return {row.values["id"]: found for row, found in media}
