"""Read benchmark files and predictions the way VLMEvalKit does, with pandas' defaults and without its images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.evaluation.scores import Answers, Item, is_missing

_IMAGES = ("image",)
_REQUIRED = ("index", "question")
_MISSING_TEXTS = frozenset(
    [
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)
"""What pandas reads as missing: so it is with answers that went through a spreadsheet."""


def read_items(path: str) -> list[Item]:
    """Return the rows of a benchmark's TSV file without its images; a missing value is NaN.

    The types of columns are pandas': a column of numbers with gaps holds floats, "None" and "NA" are missing. Raises
    ValueError if it cannot be read or lacks a column.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, sep="\t", usecols=lambda name: name not in _IMAGES)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"cannot read {path} as a TSV file: {error}") from error
    if missing := [name for name in _REQUIRED if name not in table]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table))}")
    if not len(table):
        raise ValueError(f"{path} has no rows")
    items: list[Item] = table.to_dict(orient="records")
    return items


def read_predictions(path: str) -> Answers:
    """Return {index: answer} of a JSON lines, TSV or xlsx file with the columns index and prediction.

    An answer that pandas takes for missing ("", "None", "nan" ...) is None. Raises ValueError.
    """
    rows = _read_rows(Path(path))
    if lacking := [i for i, row in enumerate(rows, 1) if "index" not in row or "prediction" not in row]:
        raise ValueError(f"row {lacking[0]} of {path} has no index or no prediction")
    return {str(row["index"]): _clean(row["prediction"]) for row in rows}


def check_complete(items: Iterable[Item], answers: Answers, path: str) -> None:
    """Raise ValueError unless there is an answer, if a missing one, for each item."""
    indices = [str(item["index"]) for item in items]
    if lacking := [index for index in indices if index not in answers]:
        raise ValueError(f"{path} has no row for {len(lacking)} of {len(indices)} items, such as {lacking[0]}")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    try:
        match path.suffix.lower():
            case ".jsonl":
                return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
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


def _clean(answer: Any) -> str | None:
    return None if is_missing(answer) or str(answer) in _MISSING_TEXTS else str(answer)
