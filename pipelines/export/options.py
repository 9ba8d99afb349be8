"""What to export, and the counts of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

FormatName = Literal["webdataset", "hf", "llava", "coco", "csv", "jsonl"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of an export.

    where: SQL expression over the columns of a row.
    min_confidence: {task: probability of the choice, or geometric mean of the probabilities of the tokens}.
    corrected: take the answers that people corrected in a review.
    text: the task whose answer is the caption; "" takes the first task with free text.
    """

    output: str
    target: str
    format: FormatName
    where: str = ""
    status: Literal["ok", "error", "all"] = "ok"
    without_flags: bool = False
    min_confidence: Mapping[str, float]
    text: str = ""
    media: bool = True
    corrected: bool = False
    rows_per_file: int = 1000
    file_size_mb: float = 512.0
    overwrite: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """The options that decide what is written."""
        return {name: value for name, value in asdict(self).items() if name not in ("target", "overwrite")}


@dataclass(frozen=True)
class Exported:
    """Counts of an export: rows of the run, those chosen, written, and those whose media could not be read."""

    rows: int
    chosen: int
    written: int
    error: int
    skipped_done: int
    files: int
    seconds: float
    target: str
