"""Build the report of an output: one pass over all rows, then the media of the rows that the page shows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.media.similarity import group_similar
from pipelines.monitoring.progress import Progress
from pipelines.report.answers import Answers
from pipelines.report.columns import OutputColumns, list_filters
from pipelines.report.opened import OpenedRun, Questions, open_output
from pipelines.report.page import render
from pipelines.report.reviewed import summarize_review
from pipelines.report.rows import get_run_name, serialize_row, serialize_run
from pipelines.report.sample import ContactSheet, PickedRow
from pipelines.report.statistics import RunStatistics
from pipelines.report.thumbnails import read_media
from pipelines.storage import store

MAX_ROWS = 5_000
_MAX_PICTURE_BYTES, _MAX_ROW_BYTES = 12_000_000, 5_000_000  # per page; the rest of its 20 MB is statistics

Json = dict[str, Any]


@dataclass(frozen=True)
class Scoring:
    """The scores of a benchmark: of the rows by id, the columns to average them by, and a line about the whole."""

    rows: Mapping[str, float]
    categories: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class ReportOptions:
    """Options of one report.

    to: a file or URI; None for the default of `resolve_report_uri`.
    rows: maximum number of rows that the page shows.
    truths: {task: kept column that holds the right answer}.
    scoring: what the answers to a benchmark scored.
    """

    output: str
    to: str | None = None
    rows: int = 300
    truths: Mapping[str, str] = field(default_factory=dict)
    scoring: Scoring | None = None
    media_limit_s: float = 600.0
    allow_private_addresses: bool = False


@dataclass(frozen=True)
class Report:
    """The result of a report: row counts of the run, rows shown, and how many of them lack their media."""

    rows: int
    ok: int
    error: int
    shown: int
    without_media: int
    num_bytes: int
    seconds: float
    report: str


def write_report(options: ReportOptions) -> Report:
    """Write the report page of an output and return its figures.

    Raise ValueError if OUTPUT holds no run or --truth does not fit it, OSError or StoreFault if a file cannot be read.
    """
    started_s = time.monotonic()
    store.allow_private_addresses(options.allow_private_addresses)
    run = open_output(options.output, options.truths)
    if options.scoring is not None:
        run = replace(run, columns=_add_scores(run.columns, options.scoring))
    counts, picked = _count_rows(run, options.rows)
    rows = _build_rows(run, picked, options.media_limit_s)
    about = serialize_run(run.output, run.record)
    data = {
        "run": {**about, "score": options.scoring.summary if options.scoring else ""},
        "statistics": counts,
        "rows": rows,
        "kept": run.columns.kept,
        "filters": list_filters(run.columns, run.found),
        "review": summarize_review(run.output),
    }
    page, uri = render(data), resolve_report_uri(options)
    store.write_bytes(uri, page)
    return Report(
        **{name: counts[name] for name in ("rows", "ok", "error")},
        shown=len(rows),
        without_media=sum("missing" in row["media"] for row in rows),
        num_bytes=len(page),
        seconds=round(time.monotonic() - started_s, 3),
        report=uri,
    )


def _add_scores(columns: OutputColumns, scoring: Scoring) -> OutputColumns:
    categories = tuple(name for name in scoring.categories if name in columns.kept)
    return replace(columns, scores=scoring.rows, categories=categories)


def resolve_report_uri(options: ReportOptions) -> str:
    """Return where to write the report: by default OUTPUT/report.html.

    For an OUTPUT in an object store, the default is NAME-report.html in the working directory, where a browser can
    open it.
    """
    if options.to is not None:
        return store.make_absolute(options.to)
    output = store.make_absolute(options.output)
    is_remote = "://" in output
    return (
        store.make_absolute(f"{get_run_name(output)}-report.html") if is_remote else store.join(output, "report.html")
    )


def _count_rows(run: OpenedRun, max_rows: int) -> tuple[Json, list[PickedRow]]:
    """Read all rows once; return their statistics and the rows to show."""
    statistics, sheet = RunStatistics(run.columns), ContactSheet(max_rows)
    with Progress("rows counted", run.num_rows) as progress:
        for rows, batch in run.read_batches(run.columns.names):
            answers = Answers(run.columns, rows, batch)
            statistics.add(answers)
            sheet.offer(answers)
            progress.advance(len(rows))
    return statistics.to_json(), sheet.list_rows()


def _build_rows(run: OpenedRun, picked: list[PickedRow], limit_s: float) -> list[Json]:
    """Return the rows as JSON, each with its media, all together within the limits of a page."""
    max_bytes = _MAX_PICTURE_BYTES // max(1, len(picked))
    if run.columns.has_prompts:
        questions: Questions = {row.row: [row.values["prompt"]] for row in picked}
    else:
        questions = run.read_questions([row.row for row in picked])
    pictures = read_media(run.manifest, picked, run.images, max_bytes=max_bytes, limit_s=limit_s)
    max_bytes = _MAX_ROW_BYTES // max(1, len(picked))
    rows = []
    with Progress("rows with their media", len(picked)) as progress:
        for row, media in pictures:
            content = serialize_row(row, run.columns, questions.get(row.row, []), max_bytes)
            rows.append({**content, "media": media})
            progress.advance(1)
    return _mark_similar(rows)


def _mark_similar(rows: list[Json]) -> list[Json]:
    """Return the rows, each with `similar`: the number of its group of pictures that look alike, null without one."""
    with_media = [place for place, row in enumerate(rows) if "hash" in row["media"]]
    found = dict(
        zip(with_media, group_similar([rows[place]["media"].pop("hash") for place in with_media]), strict=True)
    )
    return [{**row, "similar": found.get(place)} for place, row in enumerate(rows)]
