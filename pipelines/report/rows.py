"""Serialize rows and the run record to JSON of bounded size for the page, without credentials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pipelines.monitoring.error_reasons import normalize_reason
from pipelines.report.columns import COUNTS, OutputColumns, TaskColumns
from pipelines.report.page import encode_for_html
from pipelines.report.sample import PickedRow
from pipelines.storage import store

Json = dict[str, Any]

_MAX_INPUTS = 20
_MAX_ABOUT_CHARACTERS = 4_000
_FEWEST_CHARACTERS = 8


def serialize_row(picked: PickedRow, columns: OutputColumns, questions: Sequence[str | None], max_bytes: int) -> Json:
    """Serialize a row, with texts and lists shortened until it takes at most about `max_bytes` of the page.

    questions: of each task, null for the task's own prompt; empty if they are unknown.
    """
    limit = max_bytes
    while True:
        cut = partial(simplify, limit=limit)
        row = {**_build_row(picked, columns, cut), "questions": [cut(question) for question in questions]}
        if limit <= _FEWEST_CHARACTERS or len(encode_for_html(row).encode("utf-8", "backslashreplace")) <= max_bytes:
            return row
        limit //= 2


def serialize_run(output: str, record: Json) -> Json:
    """Serialize the run record: name, options, model, versions, status and duration."""
    config = {name: value for name, value in record.get("config", {}).items() if value not in (None, [], False)}
    config["input"] = [store.redact(uri) for uri in config.get("input", [])[:_MAX_INPUTS]]
    return {
        "name": get_run_name(output),
        "output": store.redact(output),
        "config": simplify(config, _MAX_ABOUT_CHARACTERS),
        "seconds": _compute_seconds(record),
        "has_tasks": bool(record.get("tasks")),
        **{name: record.get(name) for name in ("status", "num_rows", "model", "versions", "started_at", "updated_at")},
        "dtype": record.get("settled_dtype"),
        "sessions": simplify(record.get("sessions", []), _MAX_ABOUT_CHARACTERS),
    }


def get_run_name(output: str) -> str:
    """Return the last component of OUTPUT's URI."""
    return PurePosixPath(output.rstrip("/")).name or "run"


def simplify(value: Any, limit: int) -> Any:
    """Convert a value to portable JSON: no NaN, no integer beyond 2^53, texts and lists cut at `limit`."""
    match value:
        case None | bool():
            return value
        case int():
            return value if abs(value) < 2**53 else str(value)
        case float():
            return float(f"{value:.5g}") if math.isfinite(value) else None
        case str():
            return value if len(value) <= limit else f"{value[:limit]} … ({len(value):,} characters)"
        case list() | tuple():
            return [simplify(item, limit) for item in value[:limit]] + [f"… ({len(value):,} items)"] * (
                len(value) > limit
            )
        case dict():
            return {str(name): simplify(item, limit) for name, item in list(value.items())[:limit]}
    return simplify(str(value), limit)


def _build_row(picked: PickedRow, columns: OutputColumns, cut: Callable[[Any], Any]) -> Json:
    values = picked.values
    return {
        "row": picked.row,
        "id": cut(store.redact(values["id"])),
        "uri": cut(store.redact(values["uri"])),
        "status": values["status"],
        "stage": values["stage"],
        "error": cut(values["error"]),
        "reason": normalize_reason(values["stage"], values["error"]) if values["status"] == "error" else "",
        "counts": [values[name] for name in COUNTS],
        "timestamps_s": cut(values["frame_timestamps_s"]),
        "groups": picked.groups,
        "flags": cut(picked.flags),
        "answers": [_build_answer(picked, task, cut) for task in columns.tasks],
        "kept": [cut(values[name]) for name in columns.kept],
    }


def _build_answer(picked: PickedRow, task: TaskColumns, cut: Callable[[Any], Any]) -> Json:
    values = picked.values
    return {
        "value": cut(values[task.value]),
        "text": cut(values[task.text]),
        "finish": values[task.finish_reason],
        "confidence": cut(picked.confidence[task.name]),
        "scores": cut(_find_scores(values[task.confidence])),
        "truth": cut(picked.truth.get(task.name)),
        "wrong": task.name in picked.wrong,
        "alternative": cut(values.get(f"{task.name}_alternative")),
    }


def _find_scores(confidence: Any) -> Any:
    """Return {choice: probability} for a list of many choices, and any other confidence as it is."""
    if isinstance(confidence, list):
        return {pair["choice"]: pair["p"] for pair in confidence}
    return confidence


def _compute_seconds(record: Json) -> float | None:
    """Return the seconds from the run's start to the last update of its record, pauses included."""
    try:
        started, updated = (datetime.fromisoformat(record[name]) for name in ("started_at", "updated_at"))
    except (KeyError, ValueError, TypeError):
        return None
    return (updated - started).total_seconds()
