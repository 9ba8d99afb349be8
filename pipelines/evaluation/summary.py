"""Summarize a benchmark in a line: score, published value, difference, standard error, and what went wrong."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from pipelines.evaluation.benchmarks import BENCHMARKS, Benchmark, Dataset, Size
from pipelines.evaluation.files import clean_answer
from pipelines.evaluation.judge import Judge
from pipelines.evaluation.judging import judge_answers
from pipelines.evaluation.predictions import Prediction
from pipelines.evaluation.score import describe_file, describe_scores
from pipelines.evaluation.scoring.scores import Item, ScoringRules, get_index

_NUM_RESAMPLES = 1000
_MAX_EXAMPLES = 5
_HEADS = ("benchmark", "score", "published", "difference", "standard error", "rows", "error rows", "unread", "note")


@dataclass(frozen=True)
class Result:
    """The scores of a benchmark.

    content: None if it was not scored; `note` then says why. md5: of the benchmark's file, "" for several files.
    left_out: indices of items of other splits than the one whose score is published.
    """

    dataset: Dataset
    size: Size
    rules: ScoringRules
    num_rows: int
    errors: Mapping[str, str]
    content: dict[str, Any] | None
    note: str = ""
    md5: str = ""
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
        return _find_benchmark(self.dataset).get_published(self.size)

    @property
    def difference(self) -> float | None:
        """The score minus the published value; where two are published, with subtitles it is the second."""
        values = self.published.split(" | ")
        place = -1 if self.subtitles else self.dataset.published_place
        return None if self.score is None or place is None else self.score - float(values[place])

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
            **(describe_file(self.dataset, self.md5) if self.md5 else {}),
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
    md5: str = "",
    subtitles: bool = False,
    judge: Judge | None = None,
) -> Result:
    """Score the answers of a benchmark, by the judge if one is given, else if rules can."""
    errors = {index: prediction.error for index, prediction in predictions.items() if prediction.error}
    answers = {index: clean_answer(prediction.text) for index, prediction in predictions.items()}
    try:
        if judge is None:
            content = describe_scores(dataset, items, answers, rules, errors)
        else:
            content = judge_answers(judge, dataset, items, answers, rules, errors)
    except ValueError as error:
        note = f"exported, not scored: {error}"
        return Result(dataset, size, rules, len(items), errors, None, note, md5, subtitles)
    note = "; ".join(_list_notes(dataset, content, rules, md5))
    left_out = frozenset(get_index(item) for item in items if dataset.split not in (None, item.get("split")))
    return Result(dataset, size, rules, len(items), errors, content, note, md5, subtitles, left_out)


def _list_notes(dataset: Dataset, content: Mapping[str, Any], rules: ScoringRules, md5: str) -> list[str]:
    """Return what a reader of the score should know."""
    notes = ["artefacts counted"] if rules.kit_artefacts else []
    if md5 and md5 not in dataset.md5:
        notes.append("not the published file")
    if dataset.published_place is None:
        notes.append("the published value is of all parts")
    if content["doubtful"]:
        notes.append(f"{len(content['doubtful'])} doubtful")
    if content["judge"] != "none":
        cost = content["judge_cost"]
        price = f", {cost['usd']:.2f} USD" if "usd" in cost else ""
        tokens = cost["prompt_tokens"] + cost["completion_tokens"]
        notes.append(f"judged by {content['judge']}, with prompts of our own ({tokens:,} tokens{price})")
    return notes


def _find_benchmark(dataset: Dataset) -> Benchmark:
    """Return the benchmark that a file, or all of its parts together, belong to."""
    return next(b for b in BENCHMARKS if b.name == dataset.name or dataset in b.datasets)


def join_parts(results: Sequence[Result]) -> list[Result]:
    """Return the results, and one for each benchmark whose published value is of all parts, if all were scored."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.dataset.published_place is None and result.content:
            groups.setdefault(_find_benchmark(result.dataset).name, []).append(result)
    whole = [_join(name, parts) for name, parts in groups.items() if len(parts) == _count_parts(parts[0])]
    return [*results, *whole]


def _count_parts(part: Result) -> int:
    return len(_find_benchmark(part.dataset).datasets)


def _join(name: str, parts: Sequence[Result]) -> Result:
    """Return the result over the items of all parts, whose tables hold {group: [sum of scores, items]}."""
    first, contents = parts[0], [part.content or {} for part in parts]
    dataset = replace(first.dataset, name=name, published_place=0)
    table = {group: line for content in contents for group, line in content["table"].items()}
    content = {
        "benchmark": name,
        "parts": [part.dataset.name for part in parts],
        "score": dataset.headline(table, first.rules),
        "rows": _join_keys(parts, [content["rows"] for content in contents]),
        "table": table,
        "unread": {"count": sum(content["unread"]["count"] for content in contents), "examples": []},
        "judge": contents[0]["judge"],
    }
    errors = _join_keys(parts, [part.errors for part in parts])
    num_rows = sum(part.num_rows for part in parts)
    return Result(dataset, first.size, first.rules, num_rows, errors, content, "all parts together")


def _join_keys(parts: Sequence[Result], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{part.dataset.name} {index}": value
        for part, some in zip(parts, values, strict=True)
        for index, value in some.items()
    }


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
    return f"{_describe(results)}\n\n{table}\n\n" + "\n".join(_list_faults(results)) + "\n"


def render_html(results: Sequence[Result]) -> str:
    """Return the same as one page that loads nothing."""
    rows = [f"<tr><td>{'</td><td>'.join(map(html.escape, result.list_cells()))}</td></tr>" for result in results]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Scores</title>'
        "<style>body{font:15px system-ui;margin:2rem}td,th{padding:.3rem .8rem;text-align:left;"
        "border-bottom:1px solid #ccc}</style>"
        f"<h1>Scores</h1><p>{html.escape(_describe(results))}</p>"
        f"<table><tr><th>{'</th><th>'.join(_HEADS)}</th></tr>{''.join(rows)}</table>"
        f"<ul>{''.join(f'<li>{html.escape(line[2:])}</li>' for line in _list_faults(results))}</ul></html>\n"
    )


def _describe(results: Sequence[Result]) -> str:
    first = results[0]
    return (
        f"Scored by VLMEvalKit's rules of {first.rules.version}, without a judge unless a note names one, with prompts "
        f"and published values of Ovis2-{first.size}. Error rows count as wrong."
    )


def _list_faults(results: Sequence[Result]) -> list[str]:
    """Return a line for some error rows and some answers that no rule could read."""
    return [
        f"- {result.dataset.name}, index {index}: {fault}"
        for result in results
        for index, fault in _find_faults(result)
    ]


def _find_faults(result: Result) -> Iterator[tuple[str, str]]:
    parts = (result.content or {}).get("parts")
    for index, reason in islice(result.errors.items(), 0 if parts else _MAX_EXAMPLES):
        yield index, f"error row: {reason}"
    for example in result.content["unread"]["examples"] if result.content else []:
        yield example["index"], f"no rule could read {example['prediction']!r}"


def _format(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"
