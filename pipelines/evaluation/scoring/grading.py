"""How a judge grades free answers: what it is asked, and how its grades are summarized."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.evaluation.scoring.graded import summarize_mmbench_video, summarize_mmvet
from pipelines.evaluation.scoring.scores import Item, Line, get_index, sum_scores

_GRADE = """Compare the answer of a model with the expected answer and grade how much of it is right.
Ignore style and length. Reply with the grade alone: {scale}.

Question: {question}
Expected answer: {expected}
Answer of the model: {answer}"""
_TWO_GRADES = """Compare the answer of a model about a video with what is expected, and give two grades from 1 to 5.
First: {first}. Second: {second}. Reply with the two numbers alone, separated by a blank.

Question: {question}
Expected: {expected}
Answer of the model: {answer}"""
_DESCRIBED = """A model described a video. Answer the question from its description alone.
Reply with the letter of the option alone; with the word none if the description does not say.

Description: {answer}
Question: {question}"""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LETTER = re.compile(r"\b([A-D])\b")


@dataclass(frozen=True)
class Grading:
    """How the answers to a benchmark are graded.

    ask: an item and its answer -> the judge's prompt. read: an item and the reply -> the grade, None if there is none.
    summarize: items with their grade as `score` -> the table. lowest: the grade of an answer that is missing.
    """

    ask: Callable[[Item, str], str]
    read: Callable[[Item, str], float | None]
    summarize: Callable[[Sequence[Item]], Any]
    lowest: float = 0.0


def _make_grade(scale: str, highest: float) -> tuple[Callable[[Item, str], str], Callable[[Item, str], float | None]]:
    """Return what asks for one grade and what reads it."""

    def ask(item: Item, answer: str) -> str:
        return _GRADE.format(scale=scale, question=item["question"], expected=item["answer"], answer=answer)

    def read(_item: Item, reply: str) -> float | None:
        numbers = [float(number) for number in _NUMBER.findall(reply)]
        return numbers[0] if numbers and numbers[0] <= highest else None

    return ask, read


def _ask_two_grades(item: Item, answer: str) -> str:
    if item["task_type"] == "summary":
        first, second, column = "how complete it is", "how reliable it is, without errors and contradictions", "answer"
    else:
        first, second, column = (
            "how accurate it is on each point",
            "how relevant it is to the question",
            "scoring_points",
        )
    asked = {"question": item["question"], "expected": item[column], "answer": answer}
    return _TWO_GRADES.format(first=first, second=second, **asked)


def _read_two_grades(_item: Item, reply: str) -> float | None:
    """Return the sum of two grades, 2 to 10, cut to a whole number as VLMEvalKit does."""
    grades = [float(number) for number in _NUMBER.findall(reply)][:2]
    return float(int(sum(grades))) if len(grades) == 2 and all(1 <= grade <= 5 for grade in grades) else None


def _sum_by_task(items: Sequence[Item]) -> dict[str, list[int]]:
    return sum_scores(items, _collect_grades(items), lambda item: str(item["task_type"]))


def _sum_by_dimension(items: Sequence[Item]) -> dict[str, list[int]]:
    return sum_scores(items, _collect_grades(items), lambda item: f"{item['dim']}. {item['task_type']}")


def _collect_grades(items: Sequence[Item]) -> dict[str, int]:
    return {get_index(item): int(item["score"]) for item in items}


def _ask_about_description(item: Item, answer: str) -> str:
    return _DESCRIBED.format(question=item["mc_question"], answer=answer)


def _read_letter(item: Item, reply: str) -> float | None:
    letters = _LETTER.findall(reply)
    return float(letters[0] == str(item["mc_answer"])[:1]) if letters else 0.0


def _summarize_mmvet(items: Sequence[Item]) -> list[Line]:
    return summarize_mmvet(items)


MMVET = Grading(*_make_grade("a number from 0.0 (all wrong) to 1.0 (all right)", 1.0), _summarize_mmvet)
MMBENCH_VIDEO = Grading(*_make_grade("0 (wrong), 1, 2 or 3 (all right)", 3.0), summarize_mmbench_video)
MLVU_OPEN = Grading(_ask_two_grades, _read_two_grades, _sum_by_task, lowest=2.0)
TEMP_COMPASS = Grading(_ask_about_description, _read_letter, _sum_by_dimension)
