"""Describe usage errors, one line each: what was given, what is allowed, and the name that was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from jobs.options import Option
from jobs.usage import suggest
from pipelines.tasks.task import Task, list_places, read_tasks

_MAX_QUOTED = 60
_CONSTANTS = {None: "null", True: "true", False: "false"}
_TASK_FIELDS = {name: Option(name, field) for name, field in Task.model_fields.items()}

Error = Mapping[str, Any]
"""One of pydantic's `errors()`: loc, type, input, msg, ctx."""


def describe_errors(
    error: ValidationError, options: Mapping[str, Option], label: Callable[[str], str], tasks: Any = None
) -> list[str]:
    """Return a line for each error. `label` says where an option was given; `tasks` is the value of that option."""
    lines = []
    for part in error.errors():
        name, *inner = part["loc"] or ("",)
        if not name:
            lines.append(_read_own_words(part))
        elif name == "tasks" and inner:
            file = list_places(tasks)[int(inner[0])] if isinstance(tasks, str) else label(name)
            lines.append(f"{file}, {_describe_task_error(part, inner, tasks)}")
        else:
            lines.append(f"{label(str(name))}{_describe_error(part, options[str(name)])}")
    return list(dict.fromkeys(lines))  # a union reports an error for each of its members


def describe_os_error(error: OSError) -> str:
    """Return "FILE: reason", without the error number."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _describe_error(part: Error, option: Option) -> str:
    """Return what follows the name of the option."""
    given = part["input"]
    if part["type"] in ("missing", "too_short"):
        return f" is missing: {option.field.description}" if option.field.description else " is missing"
    if part["type"] != "value_error":
        return f": got {_quote(given)}; use {option.allowed}"
    words, values = _read_own_words(part), given if isinstance(given, list | tuple) else [given]
    is_sentence = any(str(value) in words for value in values if value != "")
    return f": {words}" if is_sentence else f": {', '.join(map(_quote, values))} {words}"


def _describe_task_error(part: Error, place: list[Any], tasks: Any) -> str:
    number, *inner = place
    task = (read_tasks(tasks) if isinstance(tasks, str) else tasks)[number]
    name = task.get("name") if isinstance(task, dict) else None
    label = f"task {name!r}" if isinstance(name, str) else f"task {number + 1}"
    if not inner:
        return f"{label}: got {_quote(part['input'])}; use a mapping with name and prompt"
    field = str(inner[0])
    if field not in _TASK_FIELDS:
        return f"{label}: {field} is not a field of a task" + (
            suggest(field, _TASK_FIELDS) or f"; use {', '.join(_TASK_FIELDS)}"
        )
    return f"{label}: {field}{_describe_error(part, _TASK_FIELDS[field])}".replace("answer: answer: ", "answer: ")


def _read_own_words(part: Error) -> str:
    return str(part["ctx"]["error"])


def _quote(value: Any) -> str:
    text = _CONSTANTS[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[: _MAX_QUOTED - 3]}..."
