"""Score a file of predictions against a benchmark's file, and write the scores as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.benchmarks import Dataset, Scorer, get_dataset
from pipelines.evaluation.files import read_items, read_predictions, select_answered
from pipelines.evaluation.scoring.scores import Answers, Item, Scores, ScoringRules, get_index, is_missing

_MAX_EXAMPLES = 5
_MAX_EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class ScoreReport:
    """What scoring a benchmark came to. `score` is the number that is published for it, None if there is none."""

    benchmark: str
    rules: str
    rows: int
    score: float | None
    unread: int
    doubtful: int
    artefacts: int
    output: str


def score_file(name: str, data: str, predictions: str, output: str, rules: ScoringRules) -> ScoreReport:
    """Score predictions, write `rows`, `table` and what to look at to `output`, and return the counts.

    Raise ValueError if the benchmark needs a judge, or a file cannot be used.
    """
    dataset = get_dataset(name)
    check_scorable(dataset)
    md5 = compute_md5(dataset, data)
    answers = read_predictions(predictions)
    items = select_answered(read_items(data), answers, predictions)
    content = {**describe_scores(dataset, items, answers, rules), **describe_file(dataset, md5)}
    Path(output).write_text(dump_json(content) + "\n", "utf-8")
    counts = content["unread"]["count"], len(content["doubtful"]), len(content["artefacts"])
    return ScoreReport(name, rules.version, len(items), content["score"], *counts, output)


def check_scorable(dataset: Dataset) -> Scorer:
    """Return the scorer. Raise ValueError if each answer needs a judge."""
    if dataset.scorer is None:
        raise ValueError(f"answers to {dataset.name} need a judge model and cannot be scored by rules")
    return dataset.scorer


def check_items(dataset: Dataset, items: Sequence[Item], rules: ScoringRules) -> None:
    """Raise ValueError if the items cannot be asked and scored, by doing both without a model and its answers."""
    with name_missing_column(dataset):
        for item in items:
            _ask(dataset, item)
        if dataset.grading is not None:
            dataset.grading.summarize([{**item, "score": dataset.grading.lowest} for item in items])
        elif dataset.scorer is not None and has_right_answers(items):
            dataset.scorer(items, dict.fromkeys(map(get_index, items)), rules)


def _ask(dataset: Dataset, item: Item) -> None:
    if dataset.ask is not None:
        dataset.ask(item, dataset.make_style("1B"))
    elif dataset.ask_about_video is not None:
        dataset.ask_about_video(item, 1)
    if dataset.grading is not None:
        dataset.grading.ask(item, "")


def describe_scores(
    dataset: Dataset,
    items: Sequence[Item],
    answers: Answers,
    rules: ScoringRules,
    error_rows: Collection[str] = frozenset(),
) -> dict[str, Any]:
    """Score answers and return the scores as JSON values, with examples of the answers that no rule could read.

    error_rows: indices of items without an answer to read. Raise ValueError if the benchmark needs a judge, or its file
    lacks a column or the right answers.
    """
    scorer = check_scorable(dataset)
    if not has_right_answers(items):
        raise ValueError(f"the file holds no right answers; only the organisers of {dataset.name} can score it")
    with name_missing_column(dataset):
        scores = scorer(items, answers, rules)
        doubtful = {**_find_impossible(dataset, items), **_find_lucky(scores, answers), **scores.doubtful}
    unread = [index for index in scores.unread if index not in error_rows]
    return {
        "benchmark": dataset.name,
        "judge": "none",
        "rules": asdict(rules),
        "score": dataset.headline(scores.table, rules),
        "rows": scores.rows,
        "table": scores.table,
        "unread": {"count": len(unread), "examples": _take_examples(unread, answers)},
        "doubtful": doubtful,
        "artefacts": scores.artefacts,
    }


def has_right_answers(items: Sequence[Item]) -> bool:
    """Return whether the file says what is right; test files often do not."""
    return not all(is_missing(item.get("answer")) for item in items)


@contextmanager
def name_missing_column(dataset: Dataset) -> Iterator[None]:
    """Raise ValueError for a column that an item lacks."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"the file of {dataset.name} has no column {error.args[0]}") from error


def _find_impossible(dataset: Dataset, items: Sequence[Item]) -> dict[str, str]:
    """Return {index: why no answer can be right}: the expected answer is none of the options."""
    found = {}
    for item in items:
        options = dataset.list_options(item)
        known = {str(text).lower() for option in options.items() for text in option}
        if known and not is_missing(item["answer"]) and str(item["answer"]).lower() not in known:
            found[get_index(item)] = f"the expected answer {str(item['answer'])[:80]!r} is none of the options"
    return found


def _find_lucky(scores: Scores, answers: Answers) -> dict[str, str]:
    """Return {index: why} for empty answers that are right, as the text "nan" that stands for them in VLMEvalKit."""
    right = (index for index, score in scores.rows.items() if (score[-1] if isinstance(score, list) else score))
    lucky = (index for index in right if index not in scores.artefacts and answers.get(index, "") is None)
    return dict.fromkeys(lucky, 'the empty answer was read as the text "nan"')


def _take_examples(indices: Any, answers: Answers) -> list[dict[str, Any]]:
    return [
        {"index": index, "prediction": (answers[index] or "")[:_MAX_EXAMPLE_CHARACTERS]}
        for index in list(indices)[:_MAX_EXAMPLES]
    ]


def dump_json(value: Any) -> str:
    """Return JSON in which NaN, the mean of nothing, is null."""
    return json.dumps(_replace_nan(value), ensure_ascii=False, indent=1, allow_nan=False)


def _replace_nan(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _replace_nan(part) for key, part in value.items()}
        case list() | tuple():
            return [_replace_nan(part) for part in value]
        case float() if math.isnan(value):
            return None
        case _:
            return value.item() if hasattr(value, "item") else value


def describe_file(dataset: Dataset, md5: str) -> dict[str, Any]:
    """Return the md5 of the benchmark's file, and that of the published one with older ones, as JSON values."""
    return {"md5": md5, "published_md5": list(dataset.md5)}


def compute_md5(dataset: Dataset, path: str) -> str:
    """Return the file's md5, and warn if it is not one that the benchmark is known by. Raise ValueError."""
    try:
        with Path(path).open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if found not in dataset.md5:
        print(
            f"warning: {path} has the md5 {found}; the published file of {dataset.name} has {dataset.md5[0]}, so "
            "scores may not be comparable",
            file=sys.stderr,
        )
    return found
