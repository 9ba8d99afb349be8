"""What all scorers share: items and answers in, scores per item and a summary table out."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

T = TypeVar("T")

RuleVersion: TypeAlias = Literal["2025-02", "2026-08"]
Item: TypeAlias = Mapping[str, Any]
"""A row of a benchmark's file, by column, as pandas reads it: missing values are NaN."""

Answers: TypeAlias = Mapping[str, str | None]
"""Index of an item -> the model's answer, None where it is missing."""

Line: TypeAlias = dict[str, Any]
"""A line of a summary table, by column."""

FAILED = "Failed to obtain answer via API"
"""The text with which VLMEvalKit marks a request that failed."""

FAILED_SENTENCE = f"{FAILED}."
"""The text that its video benchmarks look for."""


@dataclass(frozen=True)
class ScoringRules:
    """How answers are scored.

    version: the rules of VLMEvalKit at that time; option matching and MLVU's mean changed in between.
    kit_artefacts: also count what VLMEvalKit counts as right for a wrong reason, so that its numbers are repeated.
    """

    version: RuleVersion = "2026-08"
    kit_artefacts: bool = False


@dataclass(frozen=True)
class Scores:
    """The result of a benchmark.

    rows: index -> the score of an item (or of a group); what it holds depends on the benchmark.
    table: the summary, shaped as VLMEvalKit reports it.
    unread: indices of answers in which no rule found an option or a value; they are wrong.
    artefacts: index -> why VLMEvalKit counts the item as right although it is not.
    doubtful: index -> why the answer was probably misread; it is scored as VLMEvalKit scores it.
    """

    rows: dict[str, Any]
    table: Any
    unread: Sequence[str] = ()
    artefacts: Mapping[str, str] = field(default_factory=dict)
    doubtful: Mapping[str, str] = field(default_factory=dict)


def is_missing(value: Any) -> bool:
    """Return whether pandas read nothing: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_as_text(answer: str | None) -> str:
    """Return the answer as VLMEvalKit sees it: a missing one is the text "nan"."""
    return "nan" if answer is None else answer


def get_index(item: Item) -> str:
    """Return the index of an item as text: the key of its answer and of its score."""
    return str(item["index"])


def read_answers(items: Iterable[Item], answers: Answers, read: Callable[[Item, str | None], T]) -> dict[str, T]:
    """Return {index: what `read` finds in the answer to an item}."""
    return {get_index(item): read(item, answers[get_index(item)]) for item in items}


def sum_scores(items: Iterable[Item], rows: Mapping[str, int], group: Callable[[Item], str]) -> dict[str, list[int]]:
    """Return {group: [sum of scores, number of items]}, in the order of their first occurrence."""
    table: dict[str, list[int]] = {}
    for item in items:
        line = table.setdefault(group(item), [0, 0])
        line[0] += rows[get_index(item)]
        line[1] += 1
    return table


def average(values: Iterable[float]) -> float:
    """Return the mean, NaN of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


def list_distinct(values: Iterable[Any]) -> list[Any]:
    """Return each value once, in the order of their first occurrence, missing ones left out."""
    return list(dict.fromkeys(value for value in values if not is_missing(value)))


def parse_literal(text: Any) -> Any:
    """Return the value of a Python literal in a benchmark's file. Raise ValueError; nothing is evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{str(text)[:80]!r} is not a Python literal") from error


def parse_list(text: Any) -> list[Any]:
    """Return a list that is written as a Python literal. Raise ValueError for anything else."""
    value = parse_literal(text)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{str(text)[:80]!r} is not a list")
    return list(value)
