"""Build the report of an output: one pass over all rows, then the media of the rows that the page shows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq

from pipelines.config import ImageOptions
from pipelines.errors import RunError
from pipelines.monitoring.progress import Progress
from pipelines.output.ledger import FileEntry, count_rows, merge_ranges, read_entries
from pipelines.output.parts import list_output_parts, locate_manifest, read_whole_record
from pipelines.report.answers import Answers
from pipelines.report.columns import OutputColumns, interpret_columns, list_filters
from pipelines.report.page import render
from pipelines.report.questions import Questions, read_questions
from pipelines.report.reviewed import summarize_review
from pipelines.report.rows import get_run_name, serialize_row, serialize_run
from pipelines.report.sample import ContactSheet, PickedRow
from pipelines.report.statistics import RunStatistics
from pipelines.report.thumbnails import read_media
from pipelines.storage import store
from pipelines.storage.preflight import check_stores
from pipelines.storage.store import FileInfo

MAX_ROWS = 5_000
_MAX_PICTURE_BYTES, _MAX_ROW_BYTES = 12_000_000, 5_000_000  # per page; the rest of its 20 MB is statistics
_ROWS_AT_ONCE = 1 << 13

Json = dict[str, Any]
OutputFile = tuple[FileInfo, FileEntry]


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
    output = store.make_absolute(options.output)
    check_stores([output])
    record = _load_record(output)
    store.allow_private_addresses(options.allow_private_addresses)
    files = _list_files(output)
    with store.open_file(files[0][0].uri) as file:  # all have one schema
        found = pq.read_schema(file)
    columns = interpret_columns(record, found, options.truths)
    if options.scoring is not None:
        columns = _add_scores(columns, options.scoring)
    counts, picked = _count_rows(files, columns, options.rows)
    rows = _build_rows(output, picked, columns, _read_image_options(record), options.media_limit_s)
    run = {**serialize_run(output, record), "score": options.scoring.summary if options.scoring else ""}
    data = {
        "run": run,
        "statistics": counts,
        "rows": rows,
        "kept": columns.kept,
        "filters": list_filters(columns, found),
        "review": summarize_review(output),
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


def _load_record(output: str) -> Json:
    record = read_whole_record(output)
    if record is None or "num_rows" not in record:
        raise RunError(f"{output} holds no run (no run.json)")
    return record


def _list_files(output: str) -> list[OutputFile]:
    files = [
        (info, entry.place(part.pieces))
        for part in list_output_parts(output)
        for info, entry in read_entries(store.join(part.output, "data"))
    ]
    if not files:
        raise RunError(f"{output} holds no rows yet")
    every_range = [r for _, entry in files for r in entry.ranges]
    if count_rows(merge_ranges(every_range)) < count_rows(every_range):
        raise RunError(f"files in {output} hold the same rows twice; if a jobs.compact of it was killed, run it again")
    return files


def _count_rows(files: list[OutputFile], columns: OutputColumns, max_rows: int) -> tuple[Json, list[PickedRow]]:
    """Read all rows once; return their statistics and the rows to show."""
    statistics, sheet = RunStatistics(columns), ContactSheet(max_rows)
    num_rows = sum(count_rows(entry.ranges) for _, entry in files)
    with Progress("rows counted", num_rows) as progress:
        for answers in _read_answers(files, columns):
            statistics.add(answers)
            sheet.offer(answers)
            progress.advance(len(answers.rows))
    return statistics.to_json(), sheet.list_rows()


def _read_answers(files: list[OutputFile], columns: OutputColumns) -> Iterator[Answers]:
    for info, entry in files:
        rows, at = entry.rows, 0
        with store.open_file(info.uri) as file:
            parquet = pq.ParquetFile(file, buffer_size=store.PARQUET_BUFFER_BYTES, pre_buffer=False)
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=columns.names, use_threads=False):
                yield Answers(columns, rows[at : at + len(batch)], batch)
                at += len(batch)


def _read_image_options(record: Json) -> ImageOptions:
    """Return the run's options for images; a run of an earlier version has their defaults."""
    given = record.get("options", {})
    return ImageOptions(**{name: given[name] for name in ("partial_images", "background") if name in given})


def _build_rows(
    output: str, picked: list[PickedRow], columns: OutputColumns, images: ImageOptions, limit_s: float
) -> list[Json]:
    """Return the rows as JSON, each with its media, all together within the limits of a page."""
    max_bytes, manifest = _MAX_PICTURE_BYTES // max(1, len(picked)), locate_manifest(output)
    if columns.has_prompts:
        questions: Questions = {row.row: [row.values["prompt"]] for row in picked}
    else:
        questions = read_questions(manifest, [row.row for row in picked], columns)
    pictures = read_media(manifest, picked, images, max_bytes=max_bytes, limit_s=limit_s)
    max_bytes = _MAX_ROW_BYTES // max(1, len(picked))
    rows = []
    with Progress("rows with their media", len(picked)) as progress:
        for row, media in pictures:
            rows.append({**serialize_row(row, columns, questions.get(row.row, []), max_bytes), "media": media})
            progress.advance(1)
    return rows
