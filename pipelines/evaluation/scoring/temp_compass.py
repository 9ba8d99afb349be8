"""Score TempCompass: a choice, the matching caption, or yes and no; its captions need a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation.scoring.scores import (
    Answers,
    Item,
    Scores,
    ScoringRules,
    parse_list,
    read_answers,
    sum_scores,
)

_EMPTY = "-"  # VLMEvalKit stops at an empty answer
_LETTERS = ("A", "B", "C", "D")


def score_temp_compass(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item 0 or 1; the table holds [sum of scores, items] per dimension and type of task."""
    read = read_answers(items, answers, lambda item, answer: _score(item, answer or _EMPTY))
    rows = {index: int(score or False) for index, score in read.items()}
    table = sum_scores(items, rows, lambda item: f"{item['dim']}. {item['task_type']}")
    return Scores(rows, table, unread=[index for index, score in read.items() if score is None])


def _score(item: Item, answer: str) -> bool | None:
    """Return whether the answer is right, None if the rules read nothing in it. Raise ValueError."""
    match item["task_type"]:
        case "yes_no":
            return _score_yes_no(str(item["answer"]), answer)
        case "multi-choice":
            return _score_choice(str(item["answer"]), answer)
        case "caption_matching":
            return _score_caption(str(item["answer"]), parse_list(item["candidates"]), answer)
        case task:
            raise ValueError(f"TempCompass has no rule for the task {task!r}; captions need a judge")


def _score_yes_no(expected: str, answer: str) -> bool | None:
    word = next((start for start in ("yes", "no") if answer.lower().startswith(start)), None)
    return None if word is None else word == expected


def _score_choice(expected: str, answer: str) -> bool | None:
    if answer == expected:
        return True
    is_letter = answer in _LETTERS or answer[:2] in {f"{letter}{mark}" for letter in _LETTERS for mark in ".)"}
    return answer[0] == expected[:1] if is_letter else None


def _score_caption(expected: str, candidates: list[str], answer: str) -> bool | None:
    """Compare with what an option can be called: itself, its sentence, its label, its label without the word."""
    options = [_split_option(text) for text in candidates]
    labels = [label for label, _ in options]
    names = [
        *(text for text in candidates if text == answer),
        *(sentence for _, sentence in options if sentence in (answer, answer.partition(") ")[2] or None)),
        *(label for label in [*labels, *map(_shorten, labels)] if label in (answer, answer.replace(".", ""))),
    ]
    if not names:
        return None
    label, sentence = _split_option(expected)
    return names[-1] in (expected, label, sentence, _shorten(label))


def _split_option(text: str) -> tuple[str, str]:
    """Split "Sentence A: it moves" into its label and its sentence."""
    label, _, sentence = text.partition(": ")
    return label, sentence.split(": ")[0]


def _shorten(label: str) -> str:
    """Return the label without the word before its letter or number."""
    for word in ("Sentence ", "Option ", "Caption "):
        label = label.replace(word, "")
    return label


def summarize_temp_compass(counts: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return the table over all parts: {"dimension. task": [sum of scores, items]} -> a line each, per either, overall.

    `acc` is in percent, rounded to two digits.
    """
    totals: dict[str, list[float]] = {}
    for name, (success, overall) in counts.items():
        for group in (*name.split(". "), "overall"):
            total = totals.setdefault(group, [0.0, 0.0])
            total[0] += success
            total[1] += overall
    return [
        {"dim.task_type": name, "success": success, "overall": overall, "acc": round(success / overall * 100, 2)}
        for name, (success, overall) in [*counts.items(), *totals.items()]
    ]
