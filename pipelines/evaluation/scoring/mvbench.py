"""Score MVBench: the first word of the answer against the letter in brackets, else the rules for options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipelines.evaluation.scoring.options import assign_letters, find_option
from pipelines.evaluation.scoring.scores import (
    FAILED_SENTENCE,
    Answers,
    Item,
    Scores,
    ScoringRules,
    get_index,
    parse_list,
)

_IS_SUBSTRING = 'a substring of "(x)" counts as right'
_IS_EMPTY = "empty prediction: row without score, counted as right in the table"
_IS_FAILED = "score -1, counted as right in the table"
_IS_BRACKET = 'its first word is a substring of "(x)", whatever follows'


def score_mvbench(items: Sequence[Item], answers: Answers, rules: ScoringRules) -> Scores:
    """Score each item 0.0 or 1.0.

    VLMEvalKit counts empty answers, failed requests and single brackets as right. They are wrong here, unless
    `rules.kit_artefacts` asks for its numbers: then an empty answer has no score (None) and a failed one -1.
    """
    rows: dict[str, float | None] = {}
    unread, artefacts, doubtful = [], {}, {}
    for item in items:
        index, answer = get_index(item), answers[get_index(item)]
        score, is_read, artefact = _score(item, answer, rules)
        if score == 1 and not artefact and _is_bracket(item, str(answer), rules):
            doubtful[index] = _IS_BRACKET
        rows[index] = score if rules.kit_artefacts or not artefact else 0.0
        if artefact:
            artefacts[index] = artefact
        if not is_read:
            unread.append(index)
    return Scores(rows, _summarize(items, rows), unread, artefacts, doubtful)


def find_key(item: Item) -> tuple[str, dict[str, Any]]:
    """Return the letter of the right candidate, the last one that equals the answer, and all options."""
    options = assign_letters(parse_list(item["candidates"]))
    letters = [letter for letter, text in options.items() if text == item["answer"]]
    return (letters[-1] if letters else "@"), options  # "@" comes before "A": what VLMEvalKit makes of no candidate


def find_answered_option(item: Item, answer: str, options: dict[str, Any], rules: ScoringRules) -> bool | None:
    """Return whether the option that the answer names is the right one, None if no option is found."""
    letter = find_option(answer, options, rules.version)
    return None if letter is None else letter == _find_kit_key(item, options)


def _find_kit_key(item: Item, options: dict[str, Any]) -> Any:
    """Return what VLMEvalKit compares letters with: each candidate that equals the answer replaces it by its letter."""
    key = item["answer"]
    for letter, text in options.items():
        if text == key:
            key = letter
    return key


def _score(item: Item, answer: str | None, rules: ScoringRules) -> tuple[float | None, bool, str]:
    """Return VLMEvalKit's score, whether an option was found, and why the score is an artefact ("" if it is not)."""
    if answer is None:
        return None, False, _IS_EMPTY
    if FAILED_SENTENCE in answer:
        return -1.0, False, _IS_FAILED
    key, options = find_key(item)
    word = answer.lower().strip().split(" ")[0]
    bare, bracketed = word.replace(".", ""), f"({key.lower()})"
    if bare in bracketed or bracketed in word:
        return 1.0, True, "" if any(map(str.isalnum, answer)) else _IS_SUBSTRING
    is_right = find_answered_option(item, answer, options, rules)
    return float(is_right or False), is_right is not None, ""


def _is_bracket(item: Item, answer: str, rules: ScoringRules) -> bool:
    """Return whether a bracket before the answer is what makes it right: the words after it do not."""
    is_word = any(map(str.isalnum, answer.split()[0]))
    return not is_word and not find_answered_option(item, answer, find_key(item)[1], rules)


def _summarize(items: Sequence[Item], rows: dict[str, float | None]) -> dict[str, list[Any]]:
    """Return [right, total, percentage] per task and over all; what is not 0 counts as right, as in VLMEvalKit."""
    total, right = Counter[str](), Counter[str]()
    for item in items:
        for name in (item["task_type"], "overall"):
            total[name] += 1
            right[name] += rows[get_index(item)] != 0
    names = [name for name in total if name != "overall"]
    return {name: [right[name], total[name], f"{right[name] / total[name] * 100:.2f}%"] for name in [*names, "overall"]}
