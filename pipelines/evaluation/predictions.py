"""Write predictions as VLMEvalKit reads them: all columns but the image, and the prediction, as xlsx and TSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.evaluation.benchmarks import Dataset
from pipelines.evaluation.scoring.scores import Item, get_index, is_missing
from pipelines.storage import store

BLANKS = ("-", "~", "^")
"""Texts for an empty answer and an error row, where VLMEvalKit might stop: they are wrong everywhere."""

_MAX_CELL = 32_767
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Prediction:
    """The answer to an item, and why there is none ("" if there is one)."""

    text: str
    error: str = ""


def choose_blank(item: Item) -> str:
    """Return the first of BLANKS that no option and no accepted answer of the item is."""
    texts = [str(value).strip(" .") for value in item.values()]
    free = (blank for blank in BLANKS if not any(_holds(text, blank) for text in texts))
    return next(free, BLANKS[0])


def _holds(text: str, blank: str) -> bool:
    """Return whether a cell is the blank, or a list with it."""
    return text == blank or f"'{blank}'" in text or f'"{blank}"' in text


def write_predictions(
    output: str, dataset: Dataset, items: Sequence[Item], predictions: Mapping[str, Prediction]
) -> None:
    """Write OUTPUT/predictions/Ovis2_NAME.xlsx and .tsv; a cell of xlsx holds 32,767 characters without controls."""
    names = [*(name for name in items[0] if name != "image"), "prediction"]
    lines = [[*(_fill(item[name]) for name in names[:-1]), predictions[get_index(item)].text] for item in items]
    target = store.join(store.make_absolute(output), "predictions", f"Ovis2_{dataset.name}")
    store.write_bytes(f"{target}.tsv", _write_tsv([names, *lines]))
    store.write_bytes(f"{target}.xlsx", _write_xlsx([names, *lines]))


def _fill(value: Any) -> Any:
    return None if is_missing(value) else value.item() if hasattr(value, "item") else value


def _write_tsv(lines: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _write_xlsx(lines: Iterable[Sequence[Any]]) -> bytes:
    """Write a sheet; text stays text, also if it begins with "=". Raise ValueError without the extra `eval`."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
    except ImportError as error:
        raise ValueError(f"{error}; xlsx files need pip install 'ovis2-ray[eval]'") from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for line in lines:
        cells = [WriteOnlyCell(sheet, _clean_cell(value)) for value in line]
        for cell, value in zip(cells, line, strict=True):
            if isinstance(value, str):
                cell.data_type = "s"
        sheet.append(cells)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def _clean_cell(value: Any) -> Any:
    return _CONTROL.sub("", value)[:_MAX_CELL] if isinstance(value, str) else value
