"""Turn the rows of INPUT and the cuts of their videos into the listing of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa

from pipelines import schema
from pipelines.config import RunConfig
from pipelines.media.reference import Window
from pipelines.media.subtitles import MARK_START, narrow_subtitles
from pipelines.output.ledger import read_entries
from pipelines.output.manifest import read_columns
from pipelines.output.run_record import Run
from pipelines.output.sink import read_file
from pipelines.sources import KnownRows, Listing
from pipelines.sources.videos import strip_window
from pipelines.tasks.questionnaire import Questionnaire

_COLUMNS = schema.MANIFEST.names[1:]

Values = dict[str, Any]
_Tables = tuple[pa.Table, pa.Table | None]
"""Rows of the manifest, and the columns that they keep."""


def list_parts(config: RunConfig, run: Run, known: KnownRows) -> Listing:
    """List the parts of all videos of `run`, whose cuts are found, except those that are `known`; close it afterwards.

    Raise SourceError if two rows share an id and --on-duplicate-id is "error".
    """
    with ExitStack() as unless_listed:
        listing = unless_listed.enter_context(Listing(config.keep_columns))
        listing.groups.num_keys = run.record["num_keys_with_several_images"]
        for table, kept in _cut_tables(run, config.questionnaire, has_kept=bool(config.keep_columns)):
            left = len(table) if config.limit is None else config.limit - listing.num_rows
            if left > 0:
                listing.add(table.slice(0, left), None if kept is None else kept.slice(0, left))
        listing.check_kept()
        listing.resolve_duplicates(config.on_duplicate_id, known)
        unless_listed.pop_all()
    return listing


def _cut_tables(run: Run, questionnaire: Questionnaire, *, has_kept: bool) -> Iterator[_Tables]:
    """Yield the parts as rows of the manifest's schema without `row`, with the columns that they keep."""
    cuts, start = _CutReader(run.data_uri), 0
    for table in read_columns(run.output, run.num_rows, [*_COLUMNS, *([schema.KEPT] if has_kept else [])]):
        found = cuts.read(start, start + len(table))
        start += len(table)
        for at in range(0, len(table), schema.ROWS_PER_GROUP):
            some = slice(at, at + schema.ROWS_PER_GROUP)
            yield _cut_table(table.slice(at, schema.ROWS_PER_GROUP), found[some], questionnaire)


def _cut_table(table: pa.Table, cuts: Sequence[Values], questionnaire: Questionnaire) -> _Tables:
    rows = table.select(_COLUMNS).to_pylist()
    parts = [
        [_narrow_prompt(part, questionnaire) for part in cut_row(row, found)]
        for row, found in zip(rows, cuts, strict=True)
    ]
    origins = pa.array([number for number, some in enumerate(parts) for _ in some], pa.int64())
    cut = pa.Table.from_pylist([part for some in parts for part in some], schema.MANIFEST.remove(0))
    if schema.KEPT not in table.column_names:
        return cut, None
    kept = table.column(schema.KEPT).take(origins)
    return cut, pa.table(kept.flatten(), names=[field.name for field in kept.type])


def cut_row(row: Values, found: Values) -> list[Values]:
    """Return the parts of a row of the manifest, given its row of CUTS; an error of the latter becomes its own."""
    if found["error"]:
        return [{**row, "error": row["error"] or f"its cuts cannot be found: {found['error']}"}]
    if not found["cuts_s"]:
        return [row]
    whole = row["images"][0]
    ends_s = [whole["start_s"], *found["cuts_s"], whole["stop_s"]]
    return [_make_part(row, *ends) for ends in pairwise(ends_s)]


def _make_part(row: Values, start_s: float, stop_s: float) -> Values:
    fragment = f"#t={_format_seconds(start_s)}" + (f",{_format_seconds(stop_s)}" if stop_s < float("inf") else "")
    image = {**row["images"][0], "start_s": start_s, "stop_s": stop_s}
    uri = f"{image['uri']}{fragment}" if image["kind"] == "file" else row["uri"]
    return {**row, "id": f"{strip_window(row['id'])}{fragment}", "uri": uri, "images": [image]}


def _narrow_prompt(part: Values, questionnaire: Questionnaire) -> Values:
    """Leave the subtitles of other parts out of the prompt of a part."""
    if MARK_START not in part["prompt"] or not part["images"]:
        return part
    window = Window(part["images"][0]["start_s"], part["images"][0]["stop_s"])
    return {**part, "prompt": questionnaire.change_prompts(part["prompt"], partial(narrow_subtitles, window=window))}


def _format_seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


class _CutReader:
    """The files of CUTS, of which those are read that hold the wanted rows."""

    def __init__(self, data_uri: str) -> None:
        self._entries = read_entries(data_uri)

    def read(self, start: int, stop: int) -> list[Values]:
        """Return the rows of CUTS with the numbers from `start` to `stop`, in order."""
        found: dict[int, Values] = {}
        for info, entry in self._entries:
            if entry.ranges[0].start < stop and start < entry.ranges[-1].stop:
                numbers, table = read_file(info.uri)
                found.update(zip(numbers.tolist(), table.select(["error", "cuts_s"]).to_pylist(), strict=True))
        return [found[number] for number in range(start, stop)]
