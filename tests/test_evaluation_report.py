"""The report of an evaluation shows a page per benchmark, with scores by category and the answers that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from pipelines.evaluation.benchmarks import DATASETS
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.predictions import Prediction
from pipelines.evaluation.run import run_evaluation
from pipelines.evaluation.scoring.scores import ScoringRules
from pipelines.evaluation.summary import summarize_result
from tests.support.benchmark_files import encode_image, make_question, write_tsv
from tests.support.fake_engine import FakeEngineFactory


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two benchmarks; the fake engine answers with a quotation mark, which is right for the last item."""
    root = tmp_path_factory.mktemp("evaluation")
    kinds = ["tall", "wide", "wide"]
    rows = [
        {**make_question(i, B='"' if i == 2 else "77", A="none", image=encode_image(448, 448)), "category": kind}
        for i, kind in enumerate(kinds)
    ]
    write_tsv(root / "in" / "MMStar.tsv", *rows)
    write_tsv(root / "in" / "MMVet.tsv", {**make_question(0), "category": "ocr"})
    options = {"input": (str(root / "in"),), "output": str(root / "out"), "size": "1B"}
    config = EvaluateConfig(model="demo", benchmark="MMStar,MMVet", max_tiles=1, **options)
    run_evaluation(config, make_engine=FakeEngineFactory())
    return root / "out"


def read_page(path: Path) -> dict[str, Any]:
    match = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_each_benchmark_gets_a_page(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(evaluation)]) == 0
    pages = json.loads(capsys.readouterr().out.splitlines()[-1])["benchmarks"]
    assert list(pages) == ["MMStar", "MMVet"] and pages["MMStar"]["shown"] == 3
    data = read_page(evaluation / "runs" / "MMStar" / "report.html")
    scores = json.loads((evaluation / "scores.json").read_text())["MMStar"]["rows"]
    assert [not row["answers"][0]["wrong"] for row in data["rows"]] == [bool(scores[row["id"]]) for row in data["rows"]]
    assert 0 < sum(scores.values()) < 3
    assert data["statistics"]["categories"]["category"] == [
        {"value": "tall", "score": scores["0"], "count": 1},
        {"value": "wide", "score": scores["1"] + scores["2"], "count": 2},
    ]
    assert data["run"]["score"].startswith("MMStar: 33.3 ± ") and data["run"]["score"].endswith("52.1")
    judged = read_page(evaluation / "runs" / "MMVet" / "report.html")
    assert "exported, not scored" in judged["run"]["score"] and judged["statistics"]["categories"]["category"] == []


def test_options_of_one_page_are_refused(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(evaluation), "--truth", "text=answer"]) != 0
    assert "report OUTPUT/runs/NAME instead" in capsys.readouterr().err


def test_the_standard_error_is_that_of_the_published_split() -> None:
    """Half of the items of `dev` are right and all of `validation` are."""
    items = [
        {"index": i, "question": "?", "A": "x", "B": "y", "answer": "A", "split": split, "category": "c"}
        for i, split in enumerate(["dev", "dev", "validation", "validation"])
    ]
    predictions = {f"{i}": Prediction("B" if i == 0 else "A") for i in range(4)}
    result = summarize_result(DATASETS["MMMU_DEV_VAL"], items, predictions, ScoringRules(), "1B")
    assert result.score == 100 and result.standard_error == 0
