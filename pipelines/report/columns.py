"""Interpret the columns of an output: tasks, kinds of answers, kept columns, and what a page can filter by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from pipelines import schema

Json = dict[str, Any]
Kind = Literal["text", "bool", "int", "float", "choices", "list", "record"]

CAPTION = "text"
"""Name of the only task of a captioning run, after its column."""

COUNTS = ("num_images", "num_tiles", "num_prompt_tokens", "num_output_tokens")
"""The columns of sizes, in the order in which a page has them."""

_ROW_COLUMNS = (
    *("id", "uri", "status", "stage", "error", "frame_timestamps_s"),
    *COUNTS,
)
_TASK_SUFFIXES = ("", "_text", "_finish_reason", "_confidence", "_alternative")


@dataclass(frozen=True)
class TaskColumns:
    """The output columns of one task. `value`, `text`, `finish_reason` and `confidence` are column names.

    confidence: its column is a float32 mean log-probability or, for bool and choices, the probability of each of
        `choices`, as a struct or as a list.
    truth: name of the kept column that holds the right answer, if any.
    about: the task as in run.json.
    """

    name: str
    kind: Kind
    value: str
    text: str
    finish_reason: str
    confidence: str
    choices: tuple[str, ...]
    truth: str | None
    about: Json

    @property
    def columns(self) -> list[str]:
        """Names of the task's columns, without duplicates."""
        return [*dict.fromkeys((self.value, self.text, self.finish_reason, self.confidence))]


@dataclass(frozen=True)
class OutputColumns:
    """The columns of one output.

    kept: kept columns of the input that a page can show.
    alternatives: columns of the answers that were not chosen.
    scores: id of a row -> what its answer scores, 0 for a wrong one; it decides instead of a comparison with the truth.
    categories: kept columns by whose values scores are averaged.
    """

    tasks: tuple[TaskColumns, ...]
    kept: tuple[str, ...]
    alternatives: tuple[str, ...]
    has_flags: bool
    has_prompts: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    categories: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of all columns that a report reads."""
        names = [*_ROW_COLUMNS, *["flags"] * self.has_flags, *["prompt"] * self.has_prompts]
        of_tasks = [name for task in self.tasks for name in (*task.columns, *filter(None, [task.truth]))]
        return [*dict.fromkeys([*names, *of_tasks, *self.alternatives, *self.kept])]


def interpret_columns(record: Json, found: pa.Schema, truths: Mapping[str, str]) -> OutputColumns:
    """Interpret the columns of a run from its run.json and the schema of its files.

    truths: {task: kept column}. Raise ValueError if one of them does not exist, or if the files do not match run.json.
    """
    abouts = record.get("tasks")
    tasks = (
        [_describe_task(about, found, truths) for about in abouts] if abouts else [_describe_caption(record, truths)]
    )
    if missing := {name for task in tasks for name in task.columns} - set(found.names):
        raise ValueError(f"the output lacks the columns {sorted(missing)}; is its run.json from another run?")
    if unknown := truths.keys() - {task.name for task in tasks}:
        raise ValueError(f"--truth names {sorted(unknown)}; the tasks are {[task.name for task in tasks]}")
    if unknown := set(truths.values()) - set(found.names):
        raise ValueError(f"--truth names the columns {sorted(unknown)}, which the run did not keep (--keep-columns)")
    if not abouts:
        return OutputColumns(tuple(tasks), _select_kept(found, schema.OUTPUT.names), (), False, True)
    of_tasks = [f"{task.name}{end}" for task in tasks for end in _TASK_SUFFIXES]
    alternatives = tuple(name for name in of_tasks if name.endswith("_alternative") and name in found.names)
    return OutputColumns(
        tuple(tasks), _select_kept(found, [*_ROW_COLUMNS, "flags", *of_tasks]), alternatives, True, False
    )


def _describe_caption(record: Json, truths: Mapping[str, str]) -> TaskColumns:
    options = record.get("config", {})
    about = {"prompt": options.get("prompt"), "system": options.get("system_prompt")}
    return TaskColumns(CAPTION, "text", "text", "text", "finish_reason", "mean_logprob", (), truths.get(CAPTION), about)


def _describe_task(about: Json, found: pa.Schema, truths: Mapping[str, str]) -> TaskColumns:
    name = about["name"]
    columns = (name, f"{name}_text", f"{name}_finish_reason", f"{name}_confidence")
    types = [found.field(column).type if column in found.names else pa.null() for column in columns]
    choices = tuple(choice.name for choice in types[-1]) if pa.types.is_struct(types[-1]) else ()
    if pa.types.is_list(types[-1]):  # of (choice, p)
        choices = tuple(about["answer"]["choices"])
    return TaskColumns(name, _classify(types[0], choices), *columns, choices, truths.get(name), about)


def _classify(type_: pa.DataType, choices: tuple[str, ...]) -> Kind:
    """Return the kind by the Arrow type. Answers to a pattern or to a schema without a type are text too."""
    if pa.types.is_boolean(type_):
        return "bool"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "int" if pa.types.is_integer(type_) else "float"
    if pa.types.is_list(type_) and pa.types.is_string(type_.value_type):
        return "list"
    if pa.types.is_nested(type_):
        return "record"
    return "choices" if choices else "text"


def _select_kept(found: pa.Schema, own: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that come from the input and can be shown: not binary, not nested."""
    hidden = (pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary)
    others = [column for column in found if column.name not in set(own)]
    return tuple(column.name for column in others if not any(is_hidden(column.type) for is_hidden in hidden))


def list_filters(columns: OutputColumns, found: pa.Schema) -> list[Json]:
    """Return the columns that a page can filter by: {"name", "type", "place"}.

    type: "number", "date", "bool" or "text". place: the keys that lead to the values in the page's JSON of a row.
    """
    return [
        {"name": name, "type": kind, "place": [*place, *path]}
        for name, place in _list_places(columns)
        for name, kind, path in _list_leaves(name, _find_type(found, name), [])
    ]


def _list_places(columns: OutputColumns) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    for number, task in enumerate(columns.tasks):
        yield task.value, ("answers", number, "value")
        yield f"{task.name} confidence", ("answers", number, "confidence")
    yield from ((name, ("kept", number)) for number, name in enumerate(columns.kept))
    yield from ((name, ("counts", number)) for number, name in enumerate(COUNTS))


def _find_type(found: pa.Schema, name: str) -> pa.DataType:
    return found.field(name).type if name in found.names else pa.float64()  # a confidence


def _list_leaves(name: str, type_: pa.DataType, path: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (name, type, path) of the values inside a column. Items of lists have the path of their list."""
    if pa.types.is_struct(type_):
        for child in type_:
            yield from _list_leaves(f"{name}.{child.name}", child.type, [*path, child.name])
    elif pa.types.is_list(type_):
        yield from _list_leaves(name, type_.value_type, path)
    elif kind := next((kind for kind, is_kind in _FILTER_TYPES if is_kind(type_)), None):
        yield name, kind, path


_FILTER_TYPES: tuple[tuple[str, Callable[[pa.DataType], bool]], ...] = (
    ("bool", pa.types.is_boolean),
    ("number", pa.types.is_integer),
    ("number", pa.types.is_floating),
    ("number", pa.types.is_decimal),
    ("date", pa.types.is_date),
    ("date", pa.types.is_timestamp),
    ("text", pa.types.is_string),
    ("text", pa.types.is_large_string),
    ("text", pa.types.is_dictionary),
)
