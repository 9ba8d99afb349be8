"""Score MTVQA: the expected text must occur in the answer; the summary is a mean per language."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.evaluation.scoring.scores import (
    Answers,
    Item,
    Scores,
    ScoringRules,
    average,
    get_index,
    list_distinct,
    read_answers,
    read_as_text,
)


def score_mtvqa(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item 0 or 1, without regard to case and full stops."""
    rows = read_answers(items, answers, lambda item, answer: int(_is_right(item, read_as_text(answer))))
    table = {
        language: average(rows[get_index(item)] for item in items if item["category"] == language) * 100
        for language in list_distinct(item["category"] for item in items)
    }
    return Scores(rows, {**table, "Average": average(rows.values()) * 100})


def _is_right(item: Item, answer: str) -> bool:
    return _normalize(str(item["answer"])) in _normalize(answer)


def _normalize(text: str) -> str:
    return text.strip().lower().replace(".", "")
