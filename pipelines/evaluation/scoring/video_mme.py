"""Score Video-MME: the first capital A to D after known lead-ins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipelines.evaluation.scoring.options import find_option, get_options
from pipelines.evaluation.scoring.scores import Answers, Item, Scores, ScoringRules, average, get_index, read_as_text

DURATIONS = ("short", "medium", "long")
DOMAINS = (
    "Knowledge",
    "Film & Television",
    "Sports Competition",
    "Artistic Performance",
    "Life Record",
    "Multilingual",
)
SUB_CATEGORIES = (
    "Humanity & History",
    "Literature & Art",
    "Biology & Medicine",
    "Finance & Commerce",
    "Astronomy",
    "Geography",
    "Law",
    "Life Tip",
    "Technology",
    "Animation",
    "Movie & TV Show",
    "Documentary",
    "News Report",
    "Esports",
    "Basketball",
    "Football",
    "Athletics",
    "Other Sports",
    "Stage Play",
    "Magic Show",
    "Variety Show",
    "Acrobatics",
    "Handicraft",
    "Food",
    "Fashion",
    "Daily Life",
    "Travel",
    "Pet & Animal",
    "Exercise",
    "Multilingual",
)
TASK_TYPES = (
    "Temporal Perception",
    "Spatial Perception",
    "Attribute Perception",
    "Action Recognition",
    "Object Recognition",
    "OCR Problems",
    "Counting Problem",
    "Temporal Reasoning",
    "Spatial Reasoning",
    "Action Reasoning",
    "Object Reasoning",
    "Information Synopsis",
)
_COLUMNS = {"domain": DOMAINS, "sub_category": SUB_CATEGORIES, "task_type": TASK_TYPES}
# The two that run into each other do so in VLMEvalKit, where a comma is missing: "Best option: C" is read as B.
_LEAD_INS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)


def score_video_mme(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item 0 or 1. `doubtful` are those whose letter was read inside a word."""
    rows: dict[str, int] = {}
    unread, doubtful = [], {}
    for item in items:
        index, answer = get_index(item), read_as_text(answers[get_index(item)])
        letter = read_letter(answer) or find_option(answer, _read_options(item), rules.version)
        rows[index] = int(letter == item["answer"])
        if letter is None:
            unread.append(index)
        elif not re.search(rf"\b{letter}\b", answer):
            doubtful[index] = f"the letter {letter} was read inside a word"
    return Scores(rows, _summarize(items, rows), unread, doubtful=doubtful)


def read_letter(answer: str) -> str | None:
    """Return the first of A to D in the answer without its lead-in, None if there is none."""
    text = answer.strip()
    for lead_in in _LEAD_INS:
        text = text.replace(lead_in, "")
    match = re.search("[ABCD]", text)
    return match[0] if match else None


def _read_options(item: Item) -> dict[str, Any]:
    """Return the options that the lines of the question hold, if any."""
    options = get_options(item)
    for number, line in enumerate(str(item["question"]).split("\n")[1:]):
        letter = chr(ord("A") + number)
        _, mark, text = line.partition(f"{letter}.")
        if mark:
            options[letter] = text.strip(". \n")
    return options


def _summarize(items: Sequence[Item], rows: dict[str, int]) -> dict[str, Any]:
    """Return per duration and overall: the mean over all, per domain, sub-category and type of task, as text."""
    table = {}
    for duration in (*DURATIONS, "overall"):
        some = [item for item in items if duration in ("overall", item["duration"])]
        table[duration] = {
            "overall": _format_mean(some, rows),
            **{
                column: {name: _format_mean([i for i in some if i[column] == name], rows) for name in names}
                for column, names in _COLUMNS.items()
            },
        }
    return table


def _format_mean(items: Sequence[Item], rows: dict[str, int]) -> str:
    return f"{average(rows[get_index(item)] for item in items):.3f}"
