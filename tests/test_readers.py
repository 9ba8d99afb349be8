"""pandas, polars, DuckDB and Hugging Face `datasets` read every column of a run with each type of task as pyarrow does.

polars is large and used nowhere else, so it is no dependency: its case is skipped where it is not installed.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.output.sink import encode_file
from pipelines.tasks.answer_types import Answered, make_failed
from pipelines.tasks.questionnaire import TaskLayout
from pipelines.tasks.task import Task

DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"  # as pydantic writes it
RECORD = {
    "properties": {
        "text": {"type": "string"},
        "when": {"type": "string", "format": "date"},
        "at": {"type": "string", "format": "date-time"},
        "price": {"type": "string", "pattern": DECIMAL},
        "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        "lines": {"type": "array", "items": {"properties": {"count": {"type": "integer"}, "ok": {"type": "boolean"}}}},
        "any": {},
    }
}
ANSWERS: dict[str, tuple[Any, str]] = {
    "words": ("text", "Ein Tag am Meer \U0001f30a."),
    "yes": ("bool", "Yes"),
    "count": ("int", "-999999999999999999"),
    "share": ({"float": {"min": 0, "max": 1}}, "0.25"),
    "day": ("date", "2024-02-29"),
    "kind": ({"choices": ["cat", "dog"]}, "dog"),
    "many": ({"choices": [f"class {n}" for n in range(70)]}, "class 3"),
    "tags": ("list[str]", '["a", "b"]'),
    "parts": ({"list[choice]": ["a", "b"]}, '["b"]'),
    "code": ({"regex": "[A-Z]{2}"}, "AB"),
    "record": (
        {"json_schema": RECORD},
        '{"text": "", "when": "1999-12-31", "at": "2024-02-29T01:00:00.5+01:00", "price": "-1.50", "map": {"k": 1}, '
        '"pair": [1, "z"], "lines": [{"count": 2, "ok": false}, {}], "any": [1.5, null]}',
    ),
    "nothing": ({"json_schema": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}, "null"),
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an output file of two answered rows and one with failed tasks."""
    tasks = [Task(name=name, prompt="?", answer=spec) for name, (spec, _) in ANSWERS.items()]
    texts = [text for _, text in ANSWERS.values()]
    answered = [make_answer(task, text) for task, text in zip(tasks, texts, strict=True)]
    rows = [TaskLayout().make_columns(tasks, each) for each in (answered, answered, [make_failed("why")] * len(tasks))]
    columns = pa.schema([field for field in TaskLayout().make_schema(tasks) if field.name in rows[0]])
    table = pa.Table.from_pylist(rows, columns).append_column("status", pa.array(["ok"] * 3))
    path = tmp_path_factory.mktemp("readers") / "rows.parquet"
    path.write_bytes(encode_file(table, np.arange(3))[1])
    return path


def make_answer(task: Task, text: str) -> Answered:
    chosen = {option: float(option == text) for option in task.answer.options}
    return Answered(text, task.answer.parse(text), "stop", chosen or -0.5, (), -0.5, 3)


def read_with_pandas(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pd.read_parquet(path, dtype_backend="pyarrow").to_dict("records")
    return rows


def read_with_duckdb(path: Path) -> list[dict[str, Any]]:
    duckdb = pytest.importorskip("duckdb")
    rows: list[dict[str, Any]] = duckdb.sql(f"select * from '{path}'").to_arrow_table().to_pylist()
    return rows


def read_with_datasets(path: Path) -> list[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    return list(datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent)))


def read_with_polars(path: Path) -> list[dict[str, Any]]:
    polars = pytest.importorskip("polars", reason="polars is not installed")
    rows: list[dict[str, Any]] = polars.read_parquet(path).to_dicts()
    return rows


@pytest.mark.parametrize("read", [read_with_pandas, read_with_duckdb, read_with_datasets, read_with_polars])
def test_readers_agree_on_every_column(run_file: Path, read: Callable[[Path], list[dict[str, Any]]]) -> None:
    expected, found = pq.read_table(run_file).to_pylist(), read(run_file)
    assert len(found) == len(expected) == 3
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert {name: to_plain(other[name]) for name in one} == {name: to_plain(one[name]) for name in one}


def test_answers_keep_their_values(run_file: Path) -> None:
    first, _, failed = pq.read_table(run_file).to_pylist()
    assert first["record"]["at"] == datetime.datetime(2024, 2, 29, 0, 0, 0, 500_000, datetime.UTC)
    assert str(first["record"]["price"]) == "-1.5000000000" and json.loads(first["record"]["any"]) == [1.5, None]
    assert first["count"] == -999_999_999_999_999_999 and first["nothing"] is None
    assert {name for name in ANSWERS if failed[name] is not None} == set()
    assert failed["yes_confidence"] is failed["many_confidence"] is None and math.isnan(failed["count_confidence"])


def to_plain(value: Any) -> Any:
    """Return the value as Python has it: readers return arrays, tuples, their own nulls and their own timestamps."""
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [to_plain(each) for each in value]
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, datetime.datetime):
        moment = value.to_pydatetime() if isinstance(value, pd.Timestamp) else value
        return moment.astimezone(datetime.UTC)
    return value
