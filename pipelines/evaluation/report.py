"""Report an evaluation: a page for each benchmark, with scores by category and wrong answers with their images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.evaluation.config import CATEGORIES
from pipelines.report.build import Report, ReportOptions, Scoring, write_report
from pipelines.storage import store
from pipelines.storage.preflight import check_stores

_SCORES = "scores.json"


@dataclass(frozen=True)
class EvaluationPages:
    """The pages of an evaluation: benchmark -> the page's figures."""

    benchmarks: Mapping[str, Report]


def is_evaluation(output: str) -> bool:
    """Return whether OUTPUT is that of an evaluation that has been scored. Raise what `check_stores` raises."""
    check_stores([store.make_absolute(output)])
    return store.find_file(store.join(store.make_absolute(output), _SCORES)) is not None


def write_evaluation_report(options: ReportOptions) -> EvaluationPages:
    """Write the page of each benchmark to its run. Raise ValueError if options do not apply, or as `write_report`."""
    if options.to is not None or options.truths:
        raise ValueError("--to and --truth do not apply to an evaluation; report OUTPUT/runs/NAME instead")
    return EvaluationPages(dict(_write_pages(options)))


def _write_pages(options: ReportOptions) -> Iterator[tuple[str, Report]]:
    output = store.make_absolute(options.output)
    for name, content in json.loads(store.read_bytes(store.join(output, _SCORES))).items():
        if "parts" in content:  # each has a page of its own
            continue
        run = store.join(output, "runs", name)
        scoring = Scoring(_read_scores(content), CATEGORIES, _summarize(name, content))
        truths = {"text": "answer"} if scoring.rows else {}
        yield name, write_report(replace(options, output=run, truths=truths, scoring=scoring))


def _read_scores(content: Mapping[str, Any]) -> dict[str, float]:
    """Return {index: score}; the last of a list is the score. A question in rotations has the index of its first."""
    rows = content.get("rows", {}).items()
    scores = {index: score[-1] if isinstance(score, list) else score for index, score in rows}
    return {index: float(score) for index, score in scores.items() if score is not None}


def _summarize(name: str, content: Mapping[str, Any]) -> str:
    if content["score"] is None:
        return f"{name}: {content['note']}"
    error = f" ± {content['standard_error']:.1f}" if content.get("standard_error") is not None else ""
    return f"{name}: {content['score']:.1f}{error}; published for Ovis2-{content['size']}: {content['published']}"
