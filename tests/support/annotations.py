"""Write the output of an annotation run for tests, laid out as `jobs.annotate` does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import schema
from pipelines.media.reference import ImageRef
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import write_manifest
from pipelines.output.sink import encode_file
from pipelines.storage import store

Json = dict[str, Any]

RECORD = pa.struct(
    [("colour", pa.string()), ("size", pa.struct([("width", pa.int64())])), ("parts", pa.list_(pa.string()))]
)
TYPES: dict[str, pa.DataType] = {
    "text": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "choices": pa.string(),
    "list": pa.list_(pa.string()),
    "record": RECORD,
}

TASKS = [
    {"name": "caption", "prompt": "Describe the image.", "answer": "text"},
    {"name": "has_red", "prompt": "Is there a red object?", "answer": "bool"},
    {"name": "count", "prompt": "How many objects are there?", "answer": {"int": {"min": 0, "max": 20}}},
    {"name": "kind", "prompt": "Which shape is it?", "answer": {"choices": ["circle", "square", "triangle"]}},
    {"name": "tags", "prompt": "Tags?", "answer": {"list[str]": {"max_items": 10}}},
    {"name": "record", "prompt": "As JSON.", "answer": {"json_schema": {"type": "object"}}},
]
KINDS = ("text", "bool", "int", "choices", "list", "record")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--\u2028&amp;"


def make_answer(value: Any, text: str | None = None, confidence: Any = -0.1, finish_reason: str = "stop") -> Json:
    """Return one task's answer for one item; `text` defaults to the value as text."""
    text = (value if isinstance(value, str) else json.dumps(value)) if text is None else text
    return {"": value, "_text": text, "_finish_reason": finish_reason, "_confidence": confidence}


def make_answers(
    *, red: bool = True, count: int = 2, kind: str = "circle", sure: float = 0.9, tags: Sequence[str] = (), **more: Any
) -> list[Json]:
    """Return one answer for each of TASKS."""
    rest = 1 - sure
    kinds = {name: sure if name == kind else rest / 2 for name in ("circle", "square", "triangle")}
    record = more.get("record", {"colour": "red", "size": {"width": 4}, "parts": ["a", "b"]})
    return [
        make_answer(more.get("caption", "A circle."), confidence=more.get("logprob", -0.1)),
        make_answer(red, "Yes" if red else "No", {"Yes": sure if red else rest, "No": rest if red else sure}),
        make_answer(count),
        make_answer(kind, None, kinds),
        make_answer(list(tags), json.dumps(list(tags)), -0.2),
        make_answer(record, None if record else '{"colour": ', -0.3),
    ]


def make_item(name: str, answers: Sequence[Json], *, images: Sequence[ImageRef] = (), **columns: Any) -> Json:
    """Return an ok row, or an error row if `stage` and `error` are given; other columns are kept columns.

    `questions`, one per task, are the prompts in the manifest.
    """
    return {"id": name, "uri": images[0].uri if images else name, "images": images, "answers": answers, **columns}


def write_run(output: Path, items: Iterable[Json], *, rows_per_file: int = 1000, tasks: Sequence[Json] = TASKS) -> Path:
    """Write manifest, data files and run.json for these rows; return the directory."""
    rows = list(items)
    place = str(output)
    write_manifest(place, [_make_manifest(rows)] if rows else [])
    for start in range(0, len(rows), rows_per_file):
        part = rows[start : start + rows_per_file]
        write_rows(place, start, _make_table(part, tasks))
    write_record(output, len(rows), tasks)
    return output


def write_rows(output: str, start: int, table: pa.Table) -> None:
    entry, data = encode_file(table, np.arange(*RowRange(start, start + len(table))))
    store.write_bytes(store.join(output, "data", entry.file_name), data)


def write_record(output: Path, num_rows: int, tasks: Sequence[Json]) -> None:
    record = {
        "config": {"input": ["pictures"], "model": "demo", "keep_columns": []},
        "model": {"id": "demo", "revision": None, "weights": "0123456789abcdef"},
        "tasks": list(tasks),
        "num_rows": num_rows,
        "versions": {"ovis2-ray": "0.1.0"},
        "status": "finished",
        "started_at": "2026-01-02T03:04:05+00:00",
        "updated_at": "2026-01-02T03:04:15+00:00",
        "settled_dtype": "float32",
    }
    store.write_bytes(store.join(str(output), "run.json"), json.dumps(record).encode())


def make_output_schema(tasks: Sequence[Json], kept: Sequence[pa.Field] = ()) -> pa.Schema:
    base = [schema.OUTPUT.field(name) for name in ("id", "uri", "status", "stage", "error")]
    counts = [schema.OUTPUT.field(f"num_{name}") for name in ("images", "tiles", "prompt_tokens", "output_tokens")]
    own = [*counts, schema.OUTPUT.field("frame_timestamps_s"), pa.field("flags", pa.list_(pa.string()))]
    return pa.schema([*base, *own, *(field for task in tasks for field in _make_fields(task)), *kept])


def read_kind(task: Json) -> str:
    name = task["answer"] if isinstance(task["answer"], str) else next(iter(task["answer"]))
    return {"list[str]": "list", "json_schema": "record"}.get(name, name)


def _make_fields(task: Json) -> list[pa.Field]:
    name, kind = task["name"], read_kind(task)
    choices = {"bool": ["Yes", "No"]}.get(kind) or (task["answer"]["choices"] if kind == "choices" else None)
    confidence = pa.struct([(choice, pa.float32()) for choice in choices]) if choices else pa.float32()
    texts = [(f"{name}_text", pa.string()), (f"{name}_finish_reason", pa.string())]
    return [pa.field(*pair) for pair in ((name, TYPES[kind]), *texts, (f"{name}_confidence", confidence))]


def _make_table(rows: Sequence[Json], tasks: Sequence[Json]) -> pa.Table:
    own = {"id", "uri", "images", "answers", "questions", "num_images", "stage", "error", "flags", "frame_timestamps_s"}
    kept = pa.Table.from_pylist([{k: v for k, v in row.items() if k not in own} for row in rows])
    fields = [kept.schema.field(name) for name in kept.column_names]
    return pa.Table.from_pylist([_flatten(row, tasks) for row in rows], make_output_schema(tasks, fields))


def _flatten(row: Json, tasks: Sequence[Json]) -> Json:
    is_error = bool(row.get("error"))
    nothing = {"_text": "", "_finish_reason": ""}
    flat = {
        "status": "error" if is_error else "ok",
        "stage": "",
        "error": "",
        "num_images": 1,
        "num_tiles": 3,
        "num_prompt_tokens": 20,
        "num_output_tokens": 0 if is_error else 10,
        "frame_timestamps_s": [],
        "flags": [],
    }
    for number, task in enumerate(tasks):
        failed = {**nothing, "": None, "_confidence": None if read_kind(task) in ("bool", "choices") else math.nan}
        answer = failed if is_error else row["answers"][number]
        flat |= {f"{task['name']}{end}": value for end, value in answer.items()}
    return flat | {key: value for key, value in row.items() if key not in ("images", "answers", "questions")}


def _make_manifest(rows: Sequence[Json]) -> pa.Table:
    entries = [
        {
            **{name: row[name] for name in ("id", "uri")},
            "images": [image.to_struct() for image in row["images"]],
            "prompt": json.dumps(row["questions"]) if "questions" in row else "",
            "has_own_prompt": False,
            "error": "",
        }
        for row in rows
    ]
    return pa.Table.from_pylist(entries, schema.MANIFEST.remove(0))
