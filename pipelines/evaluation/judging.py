"""Have a judge read answers that no rule can read, and grade free answers, with prompts of our own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipelines.evaluation.benchmarks import Dataset
from pipelines.evaluation.judge import Judge, Reply
from pipelines.evaluation.predictions import BLANKS
from pipelines.evaluation.score import describe_scores
from pipelines.evaluation.scoring.scores import Answers, Item, Scores, ScoringRules, get_index

_READ = """A model was asked a question and gave an answer. Which of the numbered options does its answer choose?
Judge what the answer says, not whether it is right. Reply with the number alone; 0 if it chooses none or several.

Question: {question}
Options:
{options}
Answer of the model: {answer}"""
_READ_VALUE = """A model was asked a question and gave an answer. Which number is its final result?
Reply with that number alone, {form}; with the word none if it gives no result.

Question: {question}
Answer of the model: {answer}"""
_FORMS = {"integer": "without a decimal point", "float": "with its decimal places"}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def judge_answers(
    judge: Judge,
    dataset: Dataset,
    items: Sequence[Item],
    answers: Answers,
    rules: ScoringRules,
    error_rows: Collection[str] = frozenset(),
) -> dict[str, Any]:
    """Score answers with the judge's help and return the scores as `describe_scores` does, and the cost.

    error_rows: indices of items without an answer to read. Raise ValueError if the benchmark's file cannot be scored,
    RunError if the judge does not answer.
    """
    if dataset.grading is not None:
        content, replies = _grade(judge, dataset, items, answers)
    else:
        content, replies = _read_unread(judge, dataset, items, answers, rules, error_rows)
    return {**content, "judge": judge.endpoint.model, "judge_cost": judge.compute_cost(replies)}


def _read_unread(
    judge: Judge,
    dataset: Dataset,
    items: Sequence[Item],
    answers: Answers,
    rules: ScoringRules,
    error_rows: Collection[str],
) -> tuple[dict[str, Any], list[Reply]]:
    """Replace each answer that no rule can read by the option that the judge reads in it, and score again."""
    assert dataset.scorer is not None
    unread = set(dataset.scorer(items, answers, rules).unread)
    asked = {index: item for index, item in _select_answered(items, answers).items() if index in unread}
    prompts = {index: _ask_to_read(dataset, item, answers[index] or "") for index, item in asked.items()}
    replies = judge.ask({index: prompt for index, prompt in prompts.items() if prompt})
    read = {index: _read_choice(dataset, asked[index], reply.text) for index, reply in replies.items()}
    known = {**answers, **{index: text for index, text in read.items() if text}}
    content = describe_scores(dataset, items, known, rules, error_rows)
    return content, list(replies.values())


def _ask_to_read(dataset: Dataset, item: Item, answer: str) -> str:
    """Return the prompt, "" if nothing could be read from an answer to this item."""
    options = dataset.list_options(item)
    if options:
        lines = "\n".join(f"{number}. {text}" for number, text in enumerate(options.values(), 1))
        return _READ.format(question=item["question"], options=lines, answer=answer)
    form = _FORMS.get(str(item.get("answer_type")))
    return _READ_VALUE.format(question=item["question"], form=form, answer=answer) if form else ""


def _read_choice(dataset: Dataset, item: Item, reply: str) -> str:
    """Return the answer that scorers read, "" if the judge found none."""
    numbers = _NUMBER.findall(reply)
    options = list(dataset.list_options(item))
    if not options:
        return numbers[-1] if numbers else ""
    place = int(float(numbers[0])) if numbers else 0
    return options[place - 1] if 1 <= place <= len(options) else ""


def _grade(
    judge: Judge, dataset: Dataset, items: Sequence[Item], answers: Answers
) -> tuple[dict[str, Any], list[Reply]]:
    """Grade each answer; an answer that is missing, or that the judge does not grade, gets the lowest grade."""
    grading = dataset.grading
    assert grading is not None
    answered = _select_answered(items, answers)
    try:
        prompts = {index: grading.ask(item, answers[index] or "") for index, item in answered.items()}
        replies = judge.ask(prompts)
        grades = {index: grading.read(item, replies[index].text) for index, item in answered.items()}
        graded = [{**item, "score": _or_lowest(grades.get(get_index(item)), grading.lowest)} for item in items]
        table = grading.summarize(graded)
    except KeyError as error:
        raise ValueError(f"the file of {dataset.name} has no column {error.args[0]}") from error
    rows = {get_index(item): item["score"] for item in graded}
    unread = [index for index, grade in grades.items() if grade is None]
    scores = Scores(rows, table, unread)
    return _describe_grades(dataset, scores, replies), list(replies.values())


def _or_lowest(grade: float | None, lowest: float) -> float:
    return lowest if grade is None else grade


def _select_answered(items: Sequence[Item], answers: Answers) -> dict[str, Item]:
    """Return {index: item} of the items that have an answer."""
    return {get_index(item): item for item in items if answers[get_index(item)] not in (None, *BLANKS)}


def _describe_grades(dataset: Dataset, scores: Scores, replies: Mapping[str, Reply]) -> dict[str, Any]:
    examples = [{"index": index, "prediction": replies[index].text[:200]} for index in scores.unread[:5]]
    return {
        "benchmark": dataset.name,
        "score": dataset.headline(scores.table, ScoringRules()),
        "rows": scores.rows,
        "table": scores.table,
        "unread": {"count": len(scores.unread), "examples": examples},
        "doubtful": {},
        "artefacts": {},
    }
