"""Score MathVista as far as rules go: an option, or an answer that is nothing but the number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.evaluation.scoring.options import find_option, list_mathvista_options
from pipelines.evaluation.scoring.scores import (
    Answers,
    Item,
    Scores,
    ScoringRules,
    get_index,
    is_missing,
    parse_literal,
    read_answers,
    read_as_text,
)

_NUMBERS: dict[str, Callable[[str], float]] = {"integer": int, "float": float}


def score_mathvista(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item as [what was read, 0 or 1]; what is not read needs a judge and is wrong without one.

    Answers of other types (lists, free text) are never right, in VLMEvalKit neither.
    """
    rows = read_answers(items, answers, lambda item, answer: _score(item, read_as_text(answer), rules))
    return Scores(rows, _summarize(items, rows), unread=[index for index, (read, _) in rows.items() if read is None])


def _score(item: Item, answer: str, rules: ScoringRules) -> list[Any]:
    if item["question_type"] == "multi_choice":
        options = list_mathvista_options(item)
        letter = find_option(answer, options, rules.version)
        # Read twice, as VLMEvalKit does: what was read is looked for among the options once more.
        is_right = letter is not None and find_option(letter, options, rules.version) == item["answer_option"]
        return [letter, int(is_right)]
    number = _read_number(answer, item)
    return [number, int(number is not None)]


def _read_number(answer: str, item: Item) -> str | None:
    """Return the number if it is the right one: VLMEvalKit hands any other to the judge, and a zero as well."""
    to_number = _NUMBERS.get(str(item["answer_type"]))
    if to_number is None:
        return None
    try:
        number = to_number(answer)
        return str(number) if number and number == to_number(item["answer"]) else None
    except ValueError:
        return None


def _summarize(items: Sequence[Item], rows: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return a line per skill and task in the order of their first occurrence, after one over all."""
    total, num_read, hits = Counter[str](), Counter[str](), Counter[str]()
    for item in items:
        read, score = rows[get_index(item)]
        for name in ("Overall", *_get_skills(item), item["task"]):
            total[name] += 1
            num_read[name] += read is not None
            hits[name] += score
    return [
        {
            "Task&Skill": name,
            "tot": count,
            "prefetch": num_read[name],
            "hit": hits[name],
            "prefetch_rate": num_read[name] / count * 100,
            "acc": hits[name] / count * 100,
        }
        for name, count in total.items()
    ]


def _get_skills(item: Item) -> list[str]:
    if is_missing(item["skills"]):
        return []
    try:
        return [str(skill) for skill in parse_literal(item["skills"])]
    except ValueError:
        return [str(item["skills"])]
