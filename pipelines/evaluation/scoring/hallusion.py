"""Score HallusionBench: yes or no, summarized per answer, per figure and per question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipelines.evaluation.scoring.scores import (
    Answers,
    Item,
    Line,
    Scores,
    ScoringRules,
    average,
    get_index,
    list_distinct,
    read_answers,
    read_as_text,
)

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_MAX_PERIODS = int(re.UNICODE)  # VLMEvalKit passes the flag where `sub` takes a count


def score_hallusion(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item as [extracted answer, 0 or 1]; an answer that is neither yes nor no is Unknown and wrong."""
    found = read_answers(items, answers, lambda _, answer: read_yes_no(read_as_text(answer)))
    rows = {get_index(item): [found[get_index(item)], int(found[get_index(item)] == item["answer"])] for item in items}
    table = [_summarize("Overall", items, rows)]
    for column in ("category", "l2-category"):
        for name in list_distinct(item.get(column) for item in items):
            table.append(_summarize(name, [item for item in items if item.get(column) == name], rows))
    return Scores(rows, table, unread=[index for index, answer in found.items() if answer == "Unknown"])


def read_yes_no(answer: str) -> str:
    """Return Yes or No if exactly one of the words occurs, else Unknown."""
    words = _remove_punctuation(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def _remove_punctuation(text: str) -> str:
    """Apply VQA's rule: a mark next to a blank vanishes, one between letters becomes a blank."""
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = f"{mark} " in text or f" {mark}" in text or _THOUSANDS.search(text)
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", cleaned, _MAX_PERIODS)


def _summarize(name: str, items: Sequence[Item], rows: dict[str, Any]) -> Line:
    """Return percentages: of right answers, of figures and of questions with right answers only."""
    hits = {get_index(item): rows[get_index(item)][1] for item in items}
    figures: dict[tuple[Any, ...], list[int]] = {}
    questions: dict[tuple[Any, ...], list[int]] = {}
    for item in items:
        set_id, figure, question = _split_index(get_index(item))
        hit = hits[get_index(item)]
        figures.setdefault((item["l2-category"], set_id, figure), []).append(hit)
        questions.setdefault((item["l2-category"], set_id, question), []).append(hit)
    return {
        "split": name,
        "aAcc": average(hits.values()) * 100,
        "fAcc": average(map(all, figures.values())) * 100,
        "qAcc": average(map(all, questions.values())) * 100,
    }


def _split_index(index: str) -> list[str]:
    """Return set, figure and question. Raise ValueError for an index that does not name them."""
    parts = index.split("_")
    if len(parts) < 6:
        raise ValueError(f"the index {index} names no set, figure and question, as hb_VD_chart_0_1_0 does")
    return parts[3:6]
