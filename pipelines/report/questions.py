"""Read the questions of rows from the manifest: a row's own prompt, or a task's with the row's columns in it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.errors import StoreFault
from pipelines.media.subtitles import drop_subtitles
from pipelines.output.manifest import take_rows
from pipelines.report.columns import OutputColumns

_MAX_CHARACTERS = 20_000  # per question in memory until the page is written

Questions = dict[int, list[str | None]]
"""{row number: a question per task, null where it is the task's own prompt}."""


def read_questions(output: str, rows: Sequence[int], columns: OutputColumns) -> Questions:
    """Return the questions of these rows, whose manifest is in `output`; of none if it cannot be read."""
    numbers = sorted(rows)
    try:
        stored = take_rows(output, np.array(numbers, np.int64), ["prompt"]).column(0).to_pylist() if numbers else []
    except (OSError, StoreFault, pa.ArrowException, IndexError):  # the page says so where the media are missing
        return {}
    return {number: _split(drop_subtitles(text), columns) for number, text in zip(numbers, stored, strict=True)}


def _split(stored: str, columns: OutputColumns) -> list[str | None]:
    """Return the questions in the text that the manifest stores for a row, which with several tasks is JSON."""
    prompts = [stored] if columns.has_prompts else json.loads(stored or "[]")
    prompts += [""] * (len(columns.tasks) - len(prompts))
    return [
        None if prompt in ("", task.about.get("prompt")) else prompt[:_MAX_CHARACTERS]
        for task, prompt in zip(columns.tasks, prompts, strict=False)
    ]
