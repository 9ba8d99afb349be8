"""Benchmarks go through the pipeline: prompts and images arrive, error rows are wrong, exports score the same."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo.benchmarks import FAMILIES, write_benchmarks
from jobs import evaluate
from pipelines.errors import RunError
from pipelines.evaluation.benchmarks import DATASETS, SIZES
from pipelines.evaluation.config import IMAGES, PROMPT, EvaluateConfig
from pipelines.evaluation.files import read_items
from pipelines.evaluation.items import select_illustrated, write_items
from pipelines.evaluation.predictions import Prediction, write_predictions
from pipelines.evaluation.run import EvaluationReport, find_data, find_size, run_evaluation
from pipelines.evaluation.scoring.scores import Item, ScoringRules
from pipelines.evaluation.summary import bootstrap_error, join_parts, summarize_result
from pipelines.output.sink import read_results
from tests.support.benchmark_files import encode_image, make_question, write_tsv
from tests.support.fake_engine import FakeEngineFactory
from tests.support.roots import ROOT

GOLDEN = ROOT / "tests" / "golden" / "eval"
PROMPTS: dict[str, Any] = json.loads((GOLDEN / "prompts.json").read_text())["image"]


def list_items(name: str, data: Path, size: Any = "1B") -> list[dict[str, Any]]:
    """Return the rows of the file of items."""
    target = str(data.parent / "items" / "items.parquet")
    items = select_illustrated(read_items(str(data)), str(data))
    write_items(DATASETS[name], items, str(data), str(data.parent), size, target)
    rows: list[dict[str, Any]] = pq.read_table(target).to_pylist()
    return rows


def copy_golden(name: str, directory: Path) -> Path:
    target = directory / f"{name}.tsv"
    target.write_bytes((GOLDEN / f"{name}.tsv").read_bytes())
    return target


def make_config(tmp_path: Path, **options: Any) -> EvaluateConfig:
    given = {"benchmark": "MMStar", "input": (str(tmp_path / "in"),), "output": str(tmp_path / "out"), "size": "1B"}
    return EvaluateConfig(model="demo", **{**given, **options})


def run(config: EvaluateConfig) -> EvaluationReport:
    return run_evaluation(config, make_engine=FakeEngineFactory())


@pytest.mark.parametrize("name", PROMPTS)
def test_items_hold_the_prompts_and_images_of_vlmevalkit(name: str, tmp_path: Path) -> None:
    data = copy_golden(name, tmp_path)
    for size in SIZES if name in ("MMMU_DEV_VAL", "HallusionBench") else ["8B"]:
        rows = {row["index"]: row for row in list_items(name, data, size)}
        for wanted in PROMPTS[name]:
            [prompt] = [prompt for prompt in wanted["prompts"] if size in prompt["sizes"]]
            found = rows[wanted["index"]]
            assert found[PROMPT] == prompt["query"]
            assert len(found[IMAGES]) == len(prompt["images"]) == found[PROMPT].count("<image>")
            assert all(Image.open(io.BytesIO(image["bytes"])).size == (6, 6) for image in found[IMAGES])


def test_rotations_share_the_image_of_their_question(tmp_path: Path) -> None:
    data = write_tsv(
        tmp_path / "a.tsv", make_question(1000002, image="2"), make_question(2, image=encode_image(50, 10))
    )
    first, second = list_items("MMBench_DEV_EN", data)
    assert first[IMAGES] == second[IMAGES] and Image.open(io.BytesIO(first[IMAGES][0]["bytes"])).size == (50, 10)


def test_marks_in_a_question_are_plain_text(tmp_path: Path) -> None:
    [row] = list_items("MMStar", write_tsv(tmp_path / "a.tsv", make_question(1, question="What is <image>?")))
    assert row[PROMPT].startswith("<image>\nWhat is ?\nA. a dog")


def test_images_may_be_files(tmp_path: Path) -> None:
    rows = [
        {name: value for name, value in {**make_question(i), "image_path": path}.items() if name != "image"}
        for i, path in enumerate(["a.png", "['a.png', 'b/c.png']"])
    ]
    found = list_items("MMStar", write_tsv(tmp_path / "a.tsv", *rows))
    wanted = [[f"{tmp_path}/a.png"], [f"{tmp_path}/a.png", f"{tmp_path}/b/c.png"]]
    assert [[image["path"] for image in row[IMAGES]] for row in found] == wanted
    for path in ("/etc/passwd", "../secret.png", "s3://bucket/a.png"):
        data = write_tsv(tmp_path / "b.tsv", {**rows[0], "image_path": path})
        with pytest.raises(ValueError, match="leads out of"):
            list_items("MMStar", data)


def test_two_benchmarks_are_scored_exported_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fake engine answers with a number of tiles, which is no letter: every answer is unread and wrong."""
    (tmp_path / "in").mkdir()
    names = ["MMStar", "MMBench_DEV_EN_V11"]
    data = {name: copy_golden(name, tmp_path / "in") for name in names}
    config = make_config(tmp_path, benchmark=", ".join(names))
    report = run(config)
    assert (report.rows, report.error, report.scores) == (128, 0, dict.fromkeys(names, 0.0))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    for name in names:
        check_export(tmp_path / "out" / "predictions" / f"Ovis2_{name}", data[name], scores[name])
    assert scores["MMStar"]["unread"]["count"] == 60 and scores["MMStar"]["published"] == "52.1"
    assert scores["MMStar"]["difference"] == -52.1 and scores["MMStar"]["standard_error"] == 0.0
    assert "| MMStar | 0.0 | 52.1 | -52.1 |" in (tmp_path / "out" / "scores.md").read_text()
    assert "<td>-52.1</td>" in (tmp_path / "out" / "scores.html").read_text()
    first = read_results(str(tmp_path / "out" / "runs" / "MMStar"))
    assert first.column_names[-2:] == ["answer", "category"]
    again = run(config)
    assert again.scores == report.scores and json.loads((tmp_path / "out" / "scores.json").read_text()) == scores
    assert read_results(str(tmp_path / "out" / "runs" / "MMStar")).equals(first)
    with pytest.raises(ValueError, match="--overwrite"):
        run(make_config(tmp_path, size="8B"))
    assert capsys.readouterr().err.count("60/60 rows") <= 1


def check_export(stem: Path, data: Path, scores: dict[str, Any]) -> None:
    """Both files hold the benchmark's columns but the image, and score the same."""
    wanted = pd.read_csv(data, sep="\t").drop(columns="image")
    for found in (pd.read_csv(f"{stem}.tsv", sep="\t"), pd.read_excel(f"{stem}.xlsx")):
        assert list(found) == [*wanted, "prediction"]
        pd.testing.assert_frame_equal(found.drop(columns="prediction"), wanted, check_dtype=False)
    for suffix in ("tsv", "xlsx"):
        target = stem.with_suffix(".json")
        assert evaluate.main(["score", scores["benchmark"], str(data), f"{stem}.{suffix}", str(target)]) == 0
        found = json.loads(target.read_text())
        assert (found["rows"], found["table"]) == (scores["rows"], scores["table"])


def test_an_error_row_is_wrong_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its options are: the mark that stands for an answer is none of them."""
    rows = [
        make_question(0, B="-"),
        make_question(1, image="x" * 99, B="-", A="~"),
        make_question(2, image=encode_image()[:-40]),
        make_question(3, image=""),
        make_question(4, image="0"),
        make_question(5, question=""),
    ]
    write_tsv(tmp_path / "in" / "MMStar.tsv", *rows)
    report = run(make_config(tmp_path))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["MMStar"]
    assert (report.rows, report.error) == (5, 2)
    assert scores["error_rows"].keys() == {"1", "2"} and all(scores["error_rows"].values())
    assert scores["rows"] == dict.fromkeys("01245", 0)
    assert scores["unread"]["count"] == 3  # of the others
    page = (tmp_path / "out" / "scores.md").read_text()
    assert "- MMStar, index 1: error row: not an image" in page and "| not the published file |" in page
    exported = pd.read_csv(tmp_path / "out" / "predictions" / "Ovis2_MMStar.tsv", sep="\t")
    assert exported["prediction"].to_list()[1:3] == ["^", "-"]
    assert "left out 1 row of" in caplog.text and "without an image" in caplog.text


def test_an_error_row_names_its_file(tmp_path: Path) -> None:
    rows = [{name: value for name, value in make_question(i).items() if name != "image"} for i in range(2)]
    (tmp_path / "in").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "in" / "here.png")
    names = ["here.png", "nowhere.png"]
    write_tsv(tmp_path / "in" / "MMStar.tsv", *({**row, "image_path": n} for row, n in zip(rows, names, strict=True)))
    run(make_config(tmp_path))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["MMStar"]
    assert scores["error_rows"] == {"1": "nowhere.png: No such file or directory"}


def make_part(task: str, dim: str, right: int, wrong: int) -> tuple[list[Item], dict[str, Prediction]]:
    kinds = {"task_type": task, "dim": dim, "question": "?", "candidates": "['A. x', 'B. y']"}
    answers = ["yes" if task == "yes_no" else "A. x"] * right + ["no" if task == "yes_no" else "B. y"] * wrong
    items = [{**kinds, "index": index, "answer": answer} for index, answer in enumerate(answers)]
    return items, {str(index): Prediction(answers[0], "" if index else "unreadable") for index in range(len(items))}


def test_parts_of_a_benchmark_are_scored_together() -> None:
    """The published value of TempCompass is of all three parts; a part alone is compared with nothing."""
    given = {
        "TempCompass_MCQ": make_part("multi-choice", "order", 3, 1),
        "TempCompass_YorN": make_part("yes_no", "speed", 1, 3),
    }
    parts = [summarize_result(DATASETS[name], *part, ScoringRules(), "1B") for name, part in given.items()]
    assert [(part.score, part.difference) for part in parts] == [(75.0, None), (25.0, None)]
    assert join_parts(parts) == parts
    captions = replace(parts[0], dataset=DATASETS["TempCompass_Captioning"])
    *_, whole = join_parts([*parts, captions])
    cells = ["TempCompass", "50.0", "51.43", "-1.4"]
    assert whole.list_cells()[:4] == cells and whole.num_rows == 12 and len(whole.errors) == 3
    assert whole.to_json()["rows"]["TempCompass_YorN 0"] == 1


def test_benchmarks_that_need_a_judge_are_exported(tmp_path: Path) -> None:
    write_tsv(tmp_path / "in" / "MMVet.tsv", *({**make_question(i), "category": "ocr,math"} for i in range(3)))
    report = run(make_config(tmp_path, benchmark="MMVet", limit=2))
    assert report.rows == 2
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["MMVet"]
    assert report.scores == {"MMVet": None} and scores["note"].startswith("exported, not scored")
    assert (tmp_path / "out" / "predictions" / "Ovis2_MMVet.xlsx").exists()


def test_the_command_asks_the_demo_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_tsv(tmp_path / "a.tsv", make_question(1), make_question(2))
    arguments = ["MMStar", str(data), str(tmp_path / "out"), "--model", "demo", "--size", "8B", "--device", "cpu"]
    assert evaluate.main(arguments) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["rows"] == report["ok"] == 2 and report["scores"]["MMStar"] is not None
    [prompt, _] = read_results(str(tmp_path / "out" / "runs" / "MMStar")).column("prompt").to_pylist()
    assert prompt.startswith("<image>\nWhich?\nA. a dog\nB. a cat\nProvide a step-by-step solution")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an unknown benchmark": (lambda tmp: make_config(tmp, benchmark="MMStarr"), "did you mean MMStar"),
    "a benchmark twice": (lambda tmp: make_config(tmp, benchmark="MMStar,MMStar"), "twice"),
    "another column of images": (lambda tmp: make_config(tmp, image_column="x"), "--image-column does not apply"),
    "no such file": (lambda tmp: run(make_config(tmp, input=(str(tmp),))), "no MMStar.tsv in"),
    "no such data": (lambda tmp: run(make_config(tmp, input=("nowhere.tsv",))), "nowhere.tsv"),
    "no published size": (lambda tmp: find_size("demo", None), "give --size"),
    "no image": (lambda tmp: list_items("MMStar", write_tsv(tmp / "a.tsv", make_question(1, image=""))), "no row has"),
    "no image of another": (
        lambda tmp: list_items("MMStar", write_tsv(tmp / "a.tsv", make_question(1, image="7"))),
        "of index 7, which has none",
    ),
    "a number without image": (
        lambda tmp: list_items("MMMU_DEV_VAL", write_tsv(tmp / "a.tsv", make_question(1, question="See <image 2>"))),
        "index 1: the question names <image 2>",
    ),
    "no column of options": (
        lambda tmp: check(tmp, "MMStar", make_question(1, A="", B="")),
        "no item has an option",
    ),
    "no column of categories": (lambda tmp: check(tmp, "OCRBench", make_question(1)), "has no column category"),
    "no column that a judge needs": (
        lambda tmp: check(tmp, "MMBench-Video", make_question(1)),
        "has no column (dimensions|video)",
    ),
    "no column of videos": (
        lambda tmp: check(tmp, "MLVU_MCQ", {**make_question(1), "candidates": "['x', 'y']", "task_type": "count"}),
        "has no column video",
    ),
    "accepted answers that are no list": (
        lambda tmp: check(tmp, "OCRBench", {**make_question(1), "category": "Doc-oriented VQA"}),
        "is not a Python literal",
    ),
    "some rotations": (lambda tmp: check(tmp, "MMBench_DEV_EN", make_question(1)), "has the rotations"),
    "a list that is none": (
        lambda tmp: list_items("MMStar", write_tsv(tmp / "a.tsv", make_question(1, image="[" + "x" * 99))),
        "is not a Python literal",
    ),
}


def check(tmp_path: Path, name: str, row: dict[str, str]) -> None:
    """Run a benchmark whose file has this row; nothing may be written."""
    write_tsv(tmp_path / "in" / f"{name}.tsv", row)
    try:
        run(make_config(tmp_path, benchmark=name))
    finally:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused(case: str, tmp_path: Path) -> None:
    refused, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        refused(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_right_answers_to_the_demo_benchmarks_score_100(name: str, tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    rows = list_items(name, tmp_path / f"{name}.tsv")
    assert len(rows) >= 6 and all(row[IMAGES] and row[PROMPT] for row in rows)
    items, dataset = read_items(str(tmp_path / f"{name}.tsv")), DATASETS[name]
    answers = {str(item["index"]): find_right_answer(item) for item in items}
    if dataset.scorer and name != "OCRBench":
        assert dataset.headline(dataset.scorer(items, answers, ScoringRules()).table, ScoringRules()) == 100
    elif dataset.scorer:  # its score counts 1,000 items
        assert dataset.scorer(items, answers, ScoringRules()).table["Final Score"] == len(items)


def find_right_answer(item: Item) -> str:
    answer = str(item["answer"])
    return str(ast.literal_eval(answer)[0]) if answer.startswith("[") else answer


def test_the_only_file_may_have_any_name(tmp_path: Path) -> None:
    dataset = DATASETS["MMStar"]
    assert find_data(("mine.tsv",), dataset, is_only=True) == "mine.tsv"
    assert find_data(("a/AI2D_TEST.tsv", "b/MMStar.tsv"), dataset, is_only=False) == "b/MMStar.tsv"
    with pytest.raises(ValueError, match=r"no MMStar\.tsv"):
        find_data(("mine.tsv",), dataset, is_only=False)


def test_tiles_are_those_of_the_benchmark(tmp_path: Path) -> None:
    tiles = [make_config(tmp_path, benchmark=name).max_tiles_per_image(2) for name in ("MMStar", "MTVQA_TEST")]
    assert tiles == [6, 12]
    assert make_config(tmp_path, rules="2025-02").max_tiles_per_image(2) == 9
    assert make_config(tmp_path, max_tiles=3).max_tiles_per_image(2) == 3
    assert make_config(tmp_path).max_new_tokens == 1024


def test_a_spreadsheet_keeps_texts_as_they_are(tmp_path: Path) -> None:
    texts = ["=1+1", "a\tb\nc", "007", " x ", "\x01ring"]
    items = [{"index": i, "question": "Which?", "A": float("nan")} for i in range(len(texts))]
    predictions = {f"{i}": Prediction(text) for i, text in enumerate(texts)}
    write_predictions(str(tmp_path), DATASETS["MMStar"], items, predictions)
    stem = tmp_path / "predictions" / "Ovis2_MMStar"
    sheet = pd.read_excel(f"{stem}.xlsx", dtype=str)
    assert sheet["prediction"].to_list() == [*texts[:-1], "ring"] and sheet["A"].isna().all()
    table = pd.read_csv(f"{stem}.tsv", sep="\t", dtype=str)
    assert table["prediction"].to_list() == texts


def test_the_standard_error_is_that_of_a_mean() -> None:
    scores = [1] * 300 + [0] * 700
    assert bootstrap_error(scores) == pytest.approx(100 * (0.3 * 0.7 / 1000) ** 0.5, rel=0.1)
    assert bootstrap_error([["Yes", 1], ["No", 1]]) == 0


def test_all_benchmarks_are_checked_before_the_first_starts(ray_cluster: None, tmp_path: Path) -> None:
    """The second one has answers of other options, in OUTPUT; the first one's items are new."""
    write_tsv(tmp_path / "in" / "MMStar.tsv", make_question(1))
    run(make_config(tmp_path))
    copy_golden("MMBench_DEV_EN_V11", tmp_path / "in")
    with pytest.raises(RunError, match="seed 0 there, 7 here"):
        run(make_config(tmp_path, benchmark="MMBench_DEV_EN_V11,MMStar", seed=7))
    assert not (tmp_path / "out" / "runs" / "MMBench_DEV_EN_V11").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "http://127.0.0.1:9/v1", "judge_model": "x"}, "the judge at .* does not answer"),
        ({"num_preprocessors": 4000}, "4000 preprocessors are too many"),
        ({"max_new_tokens": 40_000}, "leaves no room for a prompt"),
        ({"benchmark": "MMStar,MMBench_DEV_EN_V11"}, r"no MMBench_DEV_EN_V11\.tsv"),
    ],
)
def test_what_cannot_work_is_refused_before_items_are_written(
    options: dict[str, Any], message: str, ray_cluster: None, tmp_path: Path
) -> None:
    write_tsv(tmp_path / "in" / "MMStar.tsv", make_question(1))
    with pytest.raises(ValueError, match=message):
        run(make_config(tmp_path, **options))
    assert not (tmp_path / "out").exists()
