"""Read which option an answer names, by VLMEvalKit's rules (vlmeval/utils/matching_util.py)."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.scoring.scores import FAILED, Item, RuleVersion, is_missing, parse_list

Options = Mapping[str, Any]
"""Letter -> text of the option."""

UNREADABLE = "Z"
"""The letter for an answer that names no option; also what a refusal counts as."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_MAX_WORDS_AFTER_LETTER = 4  # further from the end, "A" is more likely an article


def get_options(item: Item) -> dict[str, Any]:
    """Return the options of an item: its columns of one capital letter that are not missing."""
    return {letter: item[letter] for letter in string.ascii_uppercase if not is_missing(item.get(letter))}


def assign_letters(texts: list[Any]) -> dict[str, Any]:
    """Return the options A, B, C ... of a list of texts."""
    return {chr(ord("A") + number): text for number, text in enumerate(texts)}


def list_mmmu_options(item: Item) -> dict[str, Any]:
    """Return the options; an open question is a choice between its answer and all others."""
    return get_options(item) or {"A": item["answer"], "B": "Other Answers"}


def list_mathvista_options(item: Item) -> dict[str, Any]:
    """Return the options of a question that has some."""
    return assign_letters(parse_list(item["choices"])) if item["question_type"] == "multi_choice" else {}


def list_yes_no(_item: Item) -> dict[str, Any]:
    """Return the two answers."""
    return {"yes": "yes", "no": "no"}


def list_lettered_candidates(item: Item) -> dict[str, Any]:
    """Return the candidates by their letters, which they begin with."""
    return {str(text)[:1]: text for text in parse_list(item["candidates"])}


def list_bracketed_candidates(item: Item) -> dict[str, Any]:
    """Return the candidates by their letters in brackets, as they are asked."""
    return {f"({letter})": text for letter, text in assign_letters(parse_list(item["candidates"])).items()}


def list_temp_compass_options(item: Item) -> dict[str, Any]:
    """Return the answers to an item of TempCompass by themselves."""
    if item["task_type"] == "yes_no":
        return list_yes_no(item)
    return {str(text): text for text in parse_list(item["candidates"])}


def find_option(answer: str, options: Options, version: RuleVersion) -> str | None:
    """Return the letter of the option that `answer` names, None if the rules find none."""
    return _find_letter(answer, options, version) or _find_text(answer, options, version)


def _find_letter(answer: str, options: Options, version: RuleVersion) -> str | None:
    if FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return UNREADABLE
    words = answer.translate(_PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and (version == "2025-02" or _is_near_end(letters[0], words)):
        return letters[0]
    if not letters and UNREADABLE in words:
        return UNREADABLE
    match = _ANSWER_IS.search(answer) if version != "2025-02" else None
    return match[1].upper() if match and match[1].upper() in options else None


def _is_near_end(letter: str, words: list[str]) -> bool:
    return words.index(letter) >= len(words) - _MAX_WORDS_AFTER_LETTER


def _find_text(answer: str, options: Options, version: RuleVersion) -> str | None:
    """Return the letter of the only option whose text is part of the answer."""
    texts = {letter: str(text).lower() for letter, text in options.items()}
    if version != "2025-02" and len(answer.lower()) > 2 * sum(map(len, texts.values())):
        return None
    found = [letter for letter, text in texts.items() if text in answer.lower()]
    return found[0] if len(found) == 1 else None
