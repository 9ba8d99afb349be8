"""Compare two runs: how often their answers to each task agree, which answers differ, and rows side by side."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipelines.errors import RunError
from pipelines.output.ledger import read_entries
from pipelines.output.run_record import read_record
from pipelines.report.columns import OutputColumns, interpret_columns
from pipelines.report.comparison_page import render_comparison
from pipelines.report.rows import get_run_name, simplify
from pipelines.report.sample import PickedRow
from pipelines.report.thumbnails import read_media
from pipelines.storage import store
from pipelines.storage.preflight import check_stores

Json = dict[str, Any]

_MAX_PICTURE_BYTES = 12_000_000
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
    """A row of one run: its number, its status, and {task: answer}."""

    number: int
    status: str
    answers: Mapping[str, Any]


def write_comparison(first: str, second: str, to: str | None, *, max_rows: int, limit_s: float) -> Compared:
    """Write the page that compares two runs and return its figures.

    Raise RunError if one of them is no run, or if they have no task or no id in common.
    """
    started_s = time.monotonic()
    first, second = store.make_absolute(first), store.make_absolute(second)
    check_stores([first, second])
    columns = [_read_columns(first), _read_columns(second)]
    tasks = [task for task in columns[0].tasks if task.name in {other.name for other in columns[1].tasks}]
    rows = [_read_rows(output, own) for output, own in zip((first, second), columns, strict=True)]
    shared = [name for name in rows[0] if name in rows[1]]
    if not tasks or not shared:
        raise RunError(f"{first} and {second} have no {'id' if tasks else 'task'} in common")
    pairs = {name: (rows[0][name], rows[1][name]) for name in shared}
    tables = [_compare_task(task.name, task.kind, pairs.values()) for task in tasks]
    different = [name for name, pair in pairs.items() if _find_differences(pair, tables)]
    shown = different[:: max(1, len(different) // max(1, max_rows))][:max_rows]
    media = _read_pictures(first, [(name, pairs[name][0].number) for name in shown], limit_s)
    page = render_comparison(
        names=(get_run_name(first), get_run_name(second)),
        figures={
            "rows of both": len(shared),
            "only in the first": len(rows[0]) - len(shared),
            "only in the second": len(rows[1]) - len(shared),
            "rows that differ": len(different),
        },
        tables=tables,
        rows=[_serialize(name, pairs[name], tables, media[name]) for name in shown],
    )
    uri = store.make_absolute(to) if to else store.make_absolute(f"{get_run_name(first)}-{get_run_name(second)}.html")
    store.write_bytes(uri, page)
    return Compared(
        rows=len(shared),
        only_first=len(rows[0]) - len(shared),
        only_second=len(rows[1]) - len(shared),
        differ=len(different),
        shown=len(shown),
        agreement={table["task"]: table["agreement"] for table in tables},
        seconds=round(time.monotonic() - started_s, 3),
        report=uri,
    )


def _read_columns(output: str) -> OutputColumns:
    record = read_record(output)
    files = read_entries(store.join(output, "data"))
    if record is None or not files:
        raise RunError(f"{output} holds no run with rows")
    with store.open_file(files[0][0].uri) as file:
        return interpret_columns(record, pq.read_schema(file), {})


def _read_rows(output: str, columns: OutputColumns) -> dict[str, _Row]:
    """Return {id: row} with only the columns that are compared."""
    found = {}
    wanted = ["id", "status", *dict.fromkeys(task.value for task in columns.tasks)]
    for info, entry in read_entries(store.join(output, "data")):
        for number, values in zip(entry.rows.tolist(), _read_values(info.uri, wanted), strict=True):
            answers = {task.name: values[task.value] for task in columns.tasks}
            found[values["id"]] = _Row(number, values["status"], answers)
    return found


def _read_values(uri: str, columns: Sequence[str]) -> Iterator[Json]:
    with store.open_file(uri) as file:
        for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(4096, columns=list(columns)):
            yield from batch.to_pylist()


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


def _find_differences(pair: tuple[_Row, _Row], tables: Sequence[Json]) -> list[str]:
    one, other = pair
    return [table["task"] for table in tables if one.answers[table["task"]] != other.answers[table["task"]]]


def _serialize(name: str, pair: tuple[_Row, _Row], tables: Sequence[Json], media: Json) -> Json:
    """Return a row with its picture and the answers of both runs that differ."""
    answers = [
        (task, *(_shorten(row.answers[task], row.status) for row in pair)) for task in _find_differences(pair, tables)
    ]
    return {"id": store.redact(name), "media": media, "answers": answers}


def _shorten(value: Any, status: str) -> str:
    if value is None:
        return "(error)" if status == "error" else "(no answer)"
    return str(simplify(_to_text(value), _MAX_CHARACTERS))


def _read_pictures(output: str, rows: Sequence[tuple[str, int]], limit_s: float) -> dict[str, Json]:
    """Return {id: thumbnails} for rows of the first run."""
    ordered = sorted(rows, key=lambda row: row[1])
    picked = [
        PickedRow(number, {"id": name, "error": "", "frame_timestamps_s": []}, {}, [], {}, [])
        for name, number in ordered
    ]
    max_bytes = _MAX_PICTURE_BYTES // max(1, len(picked))
    return {row.values["id"]: media for row, media in read_media(output, picked, max_bytes=max_bytes, limit_s=limit_s)}
