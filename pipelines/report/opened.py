"""Open a run for its pages: record, data files of all parts, columns, options for images, questions of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import ImageOptions
from pipelines.errors import RunError, StoreFault
from pipelines.media.subtitles import drop_subtitles
from pipelines.output.ledger import FileEntry, count_rows, merge_ranges, read_entries
from pipelines.output.manifest import take_rows
from pipelines.output.parts import list_output_parts, locate_manifest, read_whole_record
from pipelines.report.columns import OutputColumns, interpret_columns
from pipelines.storage import store
from pipelines.storage.preflight import check_stores
from pipelines.storage.store import FileInfo

_ROWS_AT_ONCE = 1 << 13
_MAX_CHARACTERS = 20_000  # per question in memory until the page is written

Json = dict[str, Any]
OutputFile = tuple[FileInfo, FileEntry]
Questions = dict[int, list[str | None]]
"""{row number: a question per task, null where it is the task's own prompt}."""


@dataclass(frozen=True)
class OpenedRun:
    """A run in `output`, finished or not. `found` is the schema that all of its files have."""

    output: str
    record: Json
    files: Sequence[OutputFile]
    found: pa.Schema
    columns: OutputColumns

    @property
    def num_rows(self) -> int:
        """The number of rows in the files."""
        return sum(count_rows(entry.ranges) for _, entry in self.files)

    @property
    def manifest(self) -> str:
        """The directory whose manifest has all rows."""
        return locate_manifest(self.output)

    @property
    def images(self) -> ImageOptions:
        """The run's options that change how an image looks; a run of an earlier version has their defaults."""
        given = self.record.get("options", {})
        return ImageOptions(**{name: given[name] for name in ("partial_images", "background") if name in given})

    def read_batches(self, names: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
        """Yield row numbers, int64[N], and the columns `names` of these rows, file by file."""
        for info, entry in self.files:
            rows, at = entry.rows, 0
            with store.open_file(info.uri) as file:
                parquet = pq.ParquetFile(file, buffer_size=store.PARQUET_BUFFER_BYTES, pre_buffer=False)
                for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=list(names), use_threads=False):
                    yield rows[at : at + len(batch)], batch
                    at += len(batch)

    def read_questions(self, rows: Sequence[int]) -> Questions:
        """Return the questions of these rows from the manifest; of none if it cannot be read."""
        numbers = sorted(set(rows))
        try:
            stored = take_rows(self.manifest, np.array(numbers, np.int64), ["prompt"]).column(0) if numbers else []
        except (OSError, StoreFault, pa.ArrowException, IndexError):  # pages say so where the media are missing
            return {}
        texts = (drop_subtitles(str(text)) for text in stored)
        return {number: _split_questions(text, self.columns) for number, text in zip(numbers, texts, strict=True)}


def open_output(output: str, truths: Mapping[str, str] | None = None) -> OpenedRun:
    """Open a run for reading. `truths` are {task: kept column with the right answers}.

    Raise RunError if OUTPUT holds no run or no rows yet, ValueError if a truth does not fit it.
    """
    output = store.make_absolute(output)
    check_stores([output])
    record = read_whole_record(output)
    if record is None or "num_rows" not in record:
        raise RunError(f"{output} holds no run (no run.json)")
    files = _list_files(output)
    with store.open_file(files[0][0].uri) as file:
        found = pq.read_schema(file)
    return OpenedRun(output, record, files, found, interpret_columns(record, found, truths or {}))


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


def _split_questions(stored: str, columns: OutputColumns) -> list[str | None]:
    """Return the questions in the text that the manifest stores for a row, which with several tasks is JSON."""
    prompts = [stored] if columns.has_prompts else json.loads(stored or "[]")
    prompts += [""] * (len(columns.tasks) - len(prompts))
    return [
        None if prompt in ("", task.about.get("prompt")) else prompt[:_MAX_CHARACTERS]
        for task, prompt in zip(columns.tasks, prompts, strict=False)
    ]
