"""Score a file of predictions against a benchmark's file, and write the scores as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.benchmarks import Dataset, Scorer, get_dataset
from pipelines.evaluation.files import read_items, read_predictions, select_answered
from pipelines.evaluation.scoring.scores import Answers, Item, ScoringRules, is_missing

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
    compute_md5(dataset, data)
    answers = read_predictions(predictions)
    items = select_answered(read_items(data), answers, predictions)
    content = describe_scores(dataset, items, answers, rules)
    Path(output).write_text(dump_json(content) + "\n", "utf-8")
    counts = content["unread"]["count"], len(content["doubtful"]), len(content["artefacts"])
    return ScoreReport(name, rules.version, len(items), content["score"], *counts, output)


def check_scorable(dataset: Dataset) -> Scorer:
    """Return the scorer. Raise ValueError if each answer needs a judge."""
    if dataset.scorer is None:
        raise ValueError(f"answers to {dataset.name} need a judge model and cannot be scored by rules")
    return dataset.scorer


def describe_scores(dataset: Dataset, items: Sequence[Item], answers: Answers, rules: ScoringRules) -> dict[str, Any]:
    """Score answers and return the scores as JSON values, with examples of the answers that no rule could read.

    Raise ValueError if the benchmark needs a judge, or its file lacks a column or the right answers.
    """
    scorer = check_scorable(dataset)
    if all(is_missing(item.get("answer")) for item in items):
        raise ValueError(f"the file holds no right answers; only the organisers of {dataset.name} can score it")
    try:
        scores = scorer(items, answers, rules)
    except KeyError as error:
        raise ValueError(f"the file of {dataset.name} has no column {error.args[0]}") from error
    return {
        "benchmark": dataset.name,
        "judge": "none",
        "rules": asdict(rules),
        "score": dataset.headline(scores.table, rules),
        "rows": scores.rows,
        "table": scores.table,
        "unread": {"count": len(scores.unread), "examples": _take_examples(scores.unread, answers)},
        "doubtful": scores.doubtful,
        "artefacts": scores.artefacts,
    }


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
