"""Write files of benchmarks with drawn images."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

from PIL import Image

Row = dict[str, str]


def encode_image(width: int = 30, height: int = 20) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "orange").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_question(index: int, **fields: str) -> Row:
    question = {"index": f"{index}", "question": "Which?", "A": "a dog", "B": "a cat", "answer": "B"}
    return {**question, "image": encode_image(), **fields}


def write_tsv(path: Path, *rows: Row) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path
