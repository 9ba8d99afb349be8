"""Score MTVQA: the expected text must occur in the answer; the summary is a mean per language."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.evaluation.scores import Answers, Item, Rules, Scores, distinct, mean, to_text


def score_mtvqa(items: Sequence[Item], answers: Answers, rules: Rules) -> Scores:
    """Score each item 0 or 1, without regard to case and full stops."""
    rows = {
        str(item["index"]): int(_normalize(str(item["answer"])) in _normalize(to_text(answers[str(item["index"])])))
        for item in items
    }
    table = {
        language: mean(rows[str(item["index"])] for item in items if item["category"] == language) * 100
        for language in distinct(item["category"] for item in items)
    }
    return Scores(rows, {**table, "Average": mean(rows.values()) * 100})


def _normalize(text: str) -> str:
    return text.strip().lower().replace(".", "")
