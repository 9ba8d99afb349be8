"""Score MTVQA: the expected text must occur in the answer; the summary is a mean per language."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.evaluation.scores import Answers, Item, Scores, ScoringRules, average, list_distinct, read_as_text


def score_mtvqa(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item 0 or 1, without regard to case and full stops."""
    rows = {
        str(item["index"]): int(
            _normalize(str(item["answer"])) in _normalize(read_as_text(answers[str(item["index"])]))
        )
        for item in items
    }
    table = {
        language: average(rows[str(item["index"])] for item in items if item["category"] == language) * 100
        for language in list_distinct(item["category"] for item in items)
    }
    return Scores(rows, {**table, "Average": average(rows.values()) * 100})


def _normalize(text: str) -> str:
    return text.strip().lower().replace(".", "")
