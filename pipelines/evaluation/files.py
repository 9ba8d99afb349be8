"""Read benchmark files and predictions the way VLMEvalKit does, with pandas' defaults and without its images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ovis_model.wording import count_nouns
from pipelines.evaluation.scoring.scores import Answers, Item, get_index, is_missing
from pipelines.evaluation.tsv import TsvRow, stream_rows

MAX_INDEX_CHARACTERS = 64  # a cell of the column `image` with at most so many is the index of another row
_REQUIRED = ("index", "question")
_COLUMNS = {"index", "prediction"}
_MISSING_TEXTS = {
    *("", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "-NaN", "-nan"),
    *("-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN"),
}
"""What pandas reads as missing: so it is with answers that went through a spreadsheet."""


def read_items(path: str) -> list[Item]:
    """Return the rows of a benchmark's TSV file; in place of an image they hold "image", a missing value is NaN.

    The types of columns are pandas': a column of numbers with gaps holds floats, "None" and "NA" are missing. Raises
    ValueError if it cannot be read, lacks a column or has no rows.
    """
    import pandas as pd

    try:
        table = pd.read_csv(_copy_without_images(path), sep="\t")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as a TSV file: {error}") from error
    if missing := [name for name in _REQUIRED if name not in table]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns: {', '.join(map(str, table))}")
    if not len(table):
        raise ValueError(f"{path} has no rows")
    items: list[Item] = table.to_dict(orient="records")
    if len({get_index(item) for item in items}) < len(items):
        raise ValueError(f"{path} has rows with the same index; each needs its own")
    return items


def _copy_without_images(path: str) -> io.StringIO:
    """Return the file with a short text for each image, so that the rest of a large file fits in memory."""
    copy = io.StringIO(newline="")
    writer = csv.writer(copy, delimiter="\t", lineterminator="\n")
    rows = stream_rows(path)
    names = list(next(rows, TsvRow([], 0, 0)).cells)
    place = names.index("image") if "image" in names else None
    writer.writerow(names)
    for row in rows:
        cells = list(row.cells)
        if place is not None and len(cells) > place and len(cells[place]) > MAX_INDEX_CHARACTERS:
            cells[place] = "image"
        writer.writerow(cells)
    copy.seek(0)
    return copy


def leads_out(path: str) -> bool:
    """Return whether a path in a benchmark's file leads out of the directory that it is below."""
    return path.startswith("/") or "://" in path or ".." in PurePosixPath(path).parts


def read_predictions(path: str) -> Answers:
    """Return {index: answer} of a JSON lines, TSV or xlsx file with the columns index and prediction.

    An answer that pandas takes for missing ("", "None", "nan" ...) is None. Raise ValueError.
    """
    rows = _read_rows(Path(path))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() >= _COLUMNS:
            raise ValueError(f"row {number} of {path} has no index or no prediction")
        if isinstance(row["prediction"], dict | list):
            raise ValueError(f"row {number} of {path}: the prediction is {row['prediction']!r:.80}, not a text")
    answers = {str(row["index"]): clean_answer(row["prediction"]) for row in rows}
    if len(answers) < len(rows):
        raise ValueError(f"{path} has several predictions for the same index")
    return answers


def select_answered(items: Sequence[Item], answers: Answers, path: str) -> list[Item]:
    """Return the items without those that have neither an image nor an answer: VLMEvalKit leaves them out.

    Raise ValueError if another item has no answer, or an answer belongs to no item.
    """
    answered = [item for item in items if get_index(item) in answers]
    if strangers := list(answers.keys() - {get_index(item) for item in answered}):
        raise ValueError(
            f"{path} has {count_nouns(len(strangers), 'prediction')} for an index that the benchmark's file lacks, "
            f"such as {min(strangers)}; give the file that was asked"
        )
    lacking = [item for item in items if get_index(item) not in answers and not is_missing(item.get("image", ""))]
    if lacking:
        raise ValueError(
            f"{path} has no row for {len(lacking)} of {count_nouns(len(items), 'item')}, such as "
            f"{lacking[0]['index']}; a row with an empty prediction counts as wrong"
        )
    return answered


def _read_rows(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    try:
        match path.suffix.lower():
            case ".jsonl":
                # Not `splitlines`: a text in JSON may hold other line separators, such as U+2028.
                return [json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
            case ".tsv":
                table = pd.read_csv(path, sep="\t", dtype={"prediction": str}, usecols=["index", "prediction"])
            case ".xlsx":
                table = pd.read_excel(path, dtype={"prediction": str}, usecols=["index", "prediction"])
            case suffix:
                raise ValueError(f"predictions in {suffix or 'a file without suffix'} are not supported")
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot read {path}: {error}; give .jsonl, .tsv or .xlsx") from error
    rows: list[dict[str, Any]] = table.to_dict(orient="records")
    return rows


def clean_answer(answer: Any) -> str | None:
    """Return the answer as a spreadsheet gives it back: None if pandas takes it for missing."""
    return None if is_missing(answer) or str(answer) in _MISSING_TEXTS else str(answer)
