"""Score MLVU's multiple-choice half: the letter before the first bracket, else the rules for options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation.scoring.mvbench import find_answered_option, find_key
from pipelines.evaluation.scoring.scores import (
    FAILED_SENTENCE,
    Answers,
    Item,
    Scores,
    ScoringRules,
    read_answers,
    sum_scores,
)

CHOICE_TASKS = ("plotQA", "needle", "ego", "count", "anomaly_reco", "topic_reasoning", "order")
OPEN_TASKS = ("sub_scene", "summary")
_EMPTY = "-"  # VLMEvalKit stops at an empty answer


def score_mlvu(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item 0 or 1, a failed request -1; the table holds [sum of scores, items] per task."""
    read = read_answers(items, answers, lambda item, answer: _is_right(item, answer or _EMPTY, rules))
    failed = read_answers(items, answers, lambda _, answer: FAILED_SENTENCE in (answer or ""))
    rows = {index: -1 if failed[index] else int(is_right or False) for index, is_right in read.items()}
    table = sum_scores(items, rows, lambda item: str(item["task_type"]))
    return Scores(rows, table, unread=[index for index, is_right in read.items() if is_right is None])


def _is_right(item: Item, answer: str, rules: ScoringRules) -> bool | None:
    """Return whether the answer is right, None if it names no option."""
    key, options = find_key(item)
    before, bracket, _ = answer.partition(")")
    letter = before[-1:] if bracket else answer
    return True if letter == key else find_answered_option(item, answer, options, rules)


def summarize_mlvu(counts: Mapping[str, Sequence[int]], rules: ScoringRules) -> list[dict[str, Any]]:
    """Return the table over both halves: {task: [sum of scores, items]} -> a line per task, then M-Avg and G-Avg.

    M-Avg is in percent over all items, without the task `order` in the rules of 2025-02; G-Avg is the mean grade, 2 to
    10.
    """
    table = [_make_line(task, *counts[task], digits=1, scale=100) for task in counts]
    left_out = {"order"} if rules.version == "2025-02" else set()
    for name, tasks, digits, scale in (
        ("M-Avg", [task for task in CHOICE_TASKS if task not in left_out], 1, 100),
        ("G-Avg", OPEN_TASKS, 2, 1),
    ):
        present = [counts[task] for task in tasks if task in counts]
        if present:
            total = [sum(column) for column in zip(*present, strict=True)]
            table.append(_make_line(name, total[0], total[1], digits=digits, scale=scale))
    return table


def _make_line(task: str, success: int, overall: int, *, digits: int, scale: int) -> dict[str, Any]:
    return {"task": task, "success": success, "overall": overall, "acc": round(success / overall * scale, digits)}
