"""Summarize a benchmark in a line: score, published value, difference, standard error, and what went wrong."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluation.benchmarks import BENCHMARKS, Dataset, Size
from pipelines.evaluation.files import clean_answer
from pipelines.evaluation.judge import Judge
from pipelines.evaluation.judging import judge_answers
from pipelines.evaluation.predictions import Prediction
from pipelines.evaluation.score import describe_scores
from pipelines.evaluation.scoring.scores import Item, ScoringRules, get_index

_NUM_RESAMPLES = 1000
_HEADS = ("benchmark", "score", "published", "difference", "standard error", "rows", "error rows", "unread", "note")


@dataclass(frozen=True)
class Result:
    """The scores of a benchmark.

    content: None if it was not scored; `note` then says why.
    left_out: indices of items of other splits than the one whose score is published.
    """

    dataset: Dataset
    size: Size
    rules: ScoringRules
    num_rows: int
    errors: Mapping[str, str]
    content: dict[str, Any] | None
    note: str = ""
    subtitles: bool = False
    left_out: frozenset[str] = frozenset()

    @property
    def num_errors(self) -> int:
        """Number of error rows; they count as wrong."""
        return len(self.errors)

    @property
    def score(self) -> float | None:
        """The number that is published for the benchmark."""
        return self.content["score"] if self.content else None

    @property
    def published(self) -> str:
        """The value published for the model's size."""
        return next(b.get_published(self.size) for b in BENCHMARKS if self.dataset in b.datasets)

    @property
    def difference(self) -> float | None:
        """The score minus the published value; where two are published, with subtitles it is the second."""
        values = self.published.split(" | ")
        place = -1 if self.subtitles else self.dataset.published_place
        return None if self.score is None else self.score - float(values[place])

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean score of a row, by bootstrap."""
        if self.content is None:
            return None
        rows = {index: score for index, score in self.content["rows"].items() if index not in self.left_out}
        return bootstrap_error(rows.values(), self.dataset.score_scale)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "size": self.size,
            "published": self.published,
            "difference": self.difference,
            "standard_error": self.standard_error,
            "num_rows": self.num_rows,
            "error_rows": self.errors,
            "note": self.note,
            **(self.content or {"benchmark": self.dataset.name, "score": None}),
        }

    def list_cells(self) -> list[str]:
        """Return the line of the table, as `_HEADS`."""
        unread = str(self.content["unread"]["count"]) if self.content else ""
        numbers = [_format(self.score), self.published, _format(self.difference, "+"), _format(self.standard_error)]
        return [self.dataset.name, *numbers, f"{self.num_rows}", f"{self.num_errors}", unread, self.note]


def summarize_result(
    dataset: Dataset,
    items: Sequence[Item],
    predictions: Mapping[str, Prediction],
    rules: ScoringRules,
    size: Size,
    *,
    subtitles: bool = False,
    judge: Judge | None = None,
) -> Result:
    """Score the answers of a benchmark, by the judge if one is given, else if rules can."""
    errors = {index: prediction.error for index, prediction in predictions.items() if prediction.error}
    answers = {index: clean_answer(prediction.text) for index, prediction in predictions.items()}
    try:
        if judge is None:
            content = describe_scores(dataset, items, answers, rules)
        else:
            content = judge_answers(judge, dataset, items, answers, rules)
    except ValueError as error:
        note = f"exported, not scored: {error}"
        return Result(dataset, size, rules, len(items), errors, None, note, subtitles)
    note = _describe_judging(content, rules)
    left_out = frozenset(get_index(item) for item in items if dataset.split not in (None, item.get("split")))
    return Result(dataset, size, rules, len(items), errors, content, note, subtitles, left_out)


def _describe_judging(content: Mapping[str, Any], rules: ScoringRules) -> str:
    notes = ["artefacts counted"] if rules.kit_artefacts else []
    if content["judge"] != "none":
        cost = content["judge_cost"]
        price = f", {cost['usd']:.2f} USD" if "usd" in cost else ""
        tokens = cost["prompt_tokens"] + cost["completion_tokens"]
        notes.append(f"judged by {content['judge']}, with prompts of our own ({tokens:,} tokens{price})")
    return "; ".join(notes)


def bootstrap_error(scores: Any, scale: float = 100.0) -> float:
    """Return the standard deviation of the mean over resamples, times `scale`; the last of a list is its score."""
    values = np.array([score[-1] if isinstance(score, list) else score or 0 for score in scores], float)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(_NUM_RESAMPLES)]
    return float(np.std(means) * scale)


def render_markdown(results: Sequence[Result]) -> str:
    """Return the table, and examples of answers that no rule could read."""
    lines = [_HEADS, ["---"] * len(_HEADS), *(result.list_cells() for result in results)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"{_describe(results)}\n\n{table}\n\n" + "\n".join(_list_unread(results)) + "\n"


def render_html(results: Sequence[Result]) -> str:
    """Return the same as one page that loads nothing."""
    rows = [f"<tr><td>{'</td><td>'.join(map(html.escape, result.list_cells()))}</td></tr>" for result in results]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Scores</title>'
        "<style>body{font:15px system-ui;margin:2rem}td,th{padding:.3rem .8rem;text-align:left;"
        "border-bottom:1px solid #ccc}</style>"
        f"<h1>Scores</h1><p>{html.escape(_describe(results))}</p>"
        f"<table><tr><th>{'</th><th>'.join(_HEADS)}</th></tr>{''.join(rows)}</table>"
        f"<ul>{''.join(f'<li>{html.escape(line[2:])}</li>' for line in _list_unread(results))}</ul></html>\n"
    )


def _describe(results: Sequence[Result]) -> str:
    first = results[0]
    return (
        f"Scored by VLMEvalKit's rules of {first.rules.version}, without a judge unless a note names one, with prompts "
        f"and published values of Ovis2-{first.size}. Error rows count as wrong."
    )


def _list_unread(results: Sequence[Result]) -> list[str]:
    return [
        f"- {result.dataset.name}, index {example['index']}: no rule could read {example['prediction']!r}"
        for result in results
        if result.content
        for example in result.content["unread"]["examples"]
    ]


def _format(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"
