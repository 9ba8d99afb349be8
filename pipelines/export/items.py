"""Rows with their media, questions and answers, as all formats take them."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.errors import MediaError, StoreFault
from pipelines.export.options import ExportOptions
from pipelines.export.selection import ROW
from pipelines.media.fetch import Fetcher, PendingImages
from pipelines.media.image_formats.names import name_format
from pipelines.media.reference import FileRef, ImageRef, TarRef, parse_reference
from pipelines.output.decisions import Decisions, read_decisions
from pipelines.output.manifest import take_rows
from pipelines.report.columns import OutputColumns
from pipelines.report.opened import OpenedRun
from pipelines.storage import store
from pipelines.tasks.answer_types import parse_answer

_SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "BMP": "bmp",
    "WebP": "webp",
    "TIFF": "tif",
    "AVIF": "avif",
    "JPEG 2000": "jp2",
    "HEIC": "heic",
    "JPEG XL": "jxl",
    "netpbm": "ppm",
    "ICO": "ico",
}


@dataclass(frozen=True)
class Media:
    """The bytes of an image or video, and the suffix of its name without the dot."""

    data: bytes
    suffix: str


@dataclass(frozen=True)
class ExportItem:
    """A row to export. `key`: a name without dots; `turns`: questions and answers; `caption`: the chosen answer."""

    row: int
    key: str
    table: pa.Table  # of one row, without the row number
    turns: Sequence[tuple[str, str]]
    caption: str
    media: Sequence[Media] = ()
    error: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The columns of the row as JSON has them."""
        return {name: to_json(value) for name, value in self.table.to_pylist()[0].items()}

    @property
    def num_bytes(self) -> int:
        """The size of the row's media and, about, of its columns."""
        return sum(len(each.data) for each in self.media) + int(self.table.nbytes)


def to_json(value: Any) -> Any:
    """Return what JSON has for a value of a column: no NaN, dates and decimals as text."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: to_json(each) for name, each in value.items()}
        case list():
            return [to_json(each) for each in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case Decimal() | datetime.timedelta():
            return str(value)
        case bytes():
            return value.hex()
    return value


def make_items(options: ExportOptions, run: OpenedRun, chosen: pa.Table) -> Iterator[ExportItem]:
    """Yield the items of chosen rows, in order, with media that are fetched in parallel and ahead."""
    if not len(chosen):
        return
    numbers, columns = chosen.column(ROW).to_numpy(), run.columns
    stored = take_rows(run.manifest, np.sort(numbers), ["images", "prompt"]).to_pylist()
    plain = chosen.drop_columns([ROW])
    decisions = read_decisions(run.output) if options.corrected else {}
    images = [[parse_reference(image) for image in row["images"]] if options.media else [] for row in stored]
    places = zip(range(len(numbers)), images, strict=True)
    for place, pending in Fetcher().fetch_ahead(places):
        row = _correct(plain.slice(place, 1), int(numbers[place]), decisions, columns)
        turns = _make_turns(row.to_pylist()[0], stored[place]["prompt"], columns)
        media, error = _read_media(images[place], pending)
        yield ExportItem(
            row=int(numbers[place]),
            key=f"{int(numbers[place]):09}",
            table=row,
            turns=turns,
            caption=turns[find_caption(options.text, columns)][1],
            media=media,
            error=error,
        )


def _correct(row: pa.Table, number: int, decisions: Decisions, columns: OutputColumns) -> pa.Table:
    """Return the row with the answers that a person decided on."""
    wrong = {task.name: decisions.get((number, task.name)) for task in columns.tasks}
    values: dict[str, Any] = {}
    for task in columns.tasks:
        decision = wrong[task.name]
        if decision is not None and not decision.is_right:
            answer = parse_answer(task.about.get("answer", "text"))
            values |= {task.text: decision.text, task.value: answer.parse(decision.text)}
    return pa.Table.from_pylist([{**row.to_pylist()[0], **values}], row.schema) if values else row


def find_caption(name: str, columns: OutputColumns) -> int:
    """Return the place of the task whose answer is the caption. Raise ValueError if there is no such task."""
    names = [task.name for task in columns.tasks]
    if name and name not in names:
        raise ValueError(f"--text {name!r} is no task; the tasks are {', '.join(names)}")
    free = [place for place, task in enumerate(columns.tasks) if task.about.get("answer", "text") == "text"]
    return names.index(name) if name else next(iter(free), 0)


def _make_turns(values: Mapping[str, Any], prompt: str, columns: OutputColumns) -> list[tuple[str, str]]:
    if not columns.has_flags:
        prompts = [values.get("prompt") or prompt]
    else:  # a row without prompts has those of the tasks
        prompts = json.loads(prompt) if prompt else [str(task.about.get("prompt")) for task in columns.tasks]
    return [(question, values[task.text]) for question, task in zip(prompts, columns.tasks, strict=True)]


def _read_media(images: Sequence[ImageRef], pending: PendingImages) -> tuple[list[Media], str]:
    """Return the media of a row, and why they cannot be read."""
    try:
        found = pending.result() if images else []
    except (MediaError, StoreFault, OSError) as error:
        return [], getattr(error, "strerror", None) or str(error)
    names = [_find_suffix(image) for image in images] if len(images) == len(found) else [""] * len(found)
    return [Media(data, _sniff_suffix(data) or name or "bin") for data, name in zip(found, names, strict=True)], ""


def _find_suffix(image: ImageRef) -> str:
    name = image.member if isinstance(image, TarRef) else image.uri if isinstance(image, FileRef) else ""
    return PurePosixPath(store.strip_query(name)).suffix.lower().removeprefix(".")


def _sniff_suffix(data: bytes) -> str:
    return _SUFFIXES.get(name_format(data[:400]) or "", "")
