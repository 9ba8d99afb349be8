"""Scores, prompts, tiles, frames and subtitles of benchmarks equal those of VLMEvalKit; bad files are refused."""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from jobs import evaluate
from pipelines.evaluation.benchmarks import BENCHMARKS, DATASETS, SIZES, get_dataset
from pipelines.evaluation.files import read_items, read_predictions
from pipelines.evaluation.frames import select_subtitles, split_in_segments, spread_evenly, take_per_second
from pipelines.evaluation.prompts import cut_reasoning, place_images
from pipelines.evaluation.score import describe_scores
from pipelines.evaluation.scoring.graded import summarize_mmbench_video, summarize_mmvet
from pipelines.evaluation.scoring.mlvu import summarize_mlvu
from pipelines.evaluation.scoring.scores import Item, RuleVersion, Scores, ScoringRules
from pipelines.evaluation.scoring.temp_compass import summarize_temp_compass
from pipelines.evaluation.tsv import stream_rows
from tests.support.roots import ROOT

GOLDEN = ROOT / "tests" / "golden" / "eval"
NAMES = sorted(path.name.removesuffix(".expected.json") for path in GOLDEN.glob("*.expected.json"))
VERSIONS: tuple[RuleVersion, ...] = ("2026-08", "2025-02")

Json = dict[str, Any]
every_set = pytest.mark.parametrize("name", NAMES)


@cache
def load(file: str) -> Json:
    data: Json = json.loads((GOLDEN / f"{file}.json").read_text())
    return data


@cache
def read_set(name: str) -> list[Item]:
    return read_items(str(GOLDEN / f"{name}.tsv"))


def score(name: str, rules: ScoringRules) -> Scores:
    scorer = DATASETS[name].scorer
    assert scorer
    return scorer(read_set(name), read_predictions(str(GOLDEN / f"{name}.predictions.jsonl")), rules)


def read_expected(name: str, version: RuleVersion) -> tuple[Json, Any]:
    """Return the rows and the table that VLMEvalKit reports by these rules."""
    expected = load(f"{name}.expected")
    if version == "2026-08":
        return expected["rows"], expected["table"]
    rows = expected["rows"] | expected.get("feb2025_rows_that_differ", {})
    return rows, expected.get("feb2025_table", expected["table"])


def is_equal(found: Any, wanted: Any) -> bool:
    """Compare JSON values; numbers of a table have 8 digits, and its lines come in any order."""
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return is_equal(key_lines(found), key_lines(wanted))
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(is_equal(found[key], wanted[key]) for key in found)
    if isinstance(found, float) and math.isnan(found):
        return wanted is None or math.isnan(wanted)
    return bool(found == (pytest.approx(wanted, abs=1e-7) if isinstance(found, float) else wanted))


def key_lines(table: list[Json]) -> dict[str, Json]:
    return {str(next(iter(line.values()))): line for line in table}


@every_set
@pytest.mark.parametrize("version", VERSIONS)
def test_rows_and_tables_are_those_of_vlmevalkit(name: str, version: RuleVersion) -> None:
    rows, table = read_expected(name, version)
    found = score(name, ScoringRules(version, kit_artefacts=True))
    assert found.rows == rows
    assert is_equal(found.table, table)


@every_set
@pytest.mark.parametrize("version", VERSIONS)
def test_by_default_exactly_the_artefacts_are_wrong(name: str, version: RuleVersion) -> None:
    artefacts = load(f"{name}.expected").get("artefacts", {})
    rows, table = read_expected(name, version)
    found = score(name, ScoringRules(version))
    assert found.artefacts == artefacts
    assert found.rows == rows | dict.fromkeys(artefacts, 0.0)
    assert is_equal(found.table, table) == (not artefacts)


def test_without_artefacts_the_table_counts_the_rows() -> None:
    found = score("MVBench", ScoringRules())
    assert found.table["overall"][:2] == [sum(found.rows.values()), len(found.rows)]


@pytest.mark.parametrize("name", ["MVBench", "MLVU_MCQ"])
@pytest.mark.parametrize(("mark", "is_failed"), [("", False), (".", True), (". Sorry.", True)])
def test_only_the_whole_sentence_means_a_failed_request(name: str, mark: str, is_failed: bool) -> None:
    """Without its full stop the video benchmarks read it as an answer, which is wrong."""
    scorer, [item, *_] = DATASETS[name].scorer, read_set(name)
    assert scorer
    answers = {str(item["index"]): f"Failed to obtain answer via API{mark}"}
    assert scorer([item], answers, ScoringRules(kit_artefacts=True)).rows == {
        str(item["index"]): -1 if is_failed else 0
    }


@pytest.mark.parametrize("name", load("prompts")["image"])
def test_image_prompts_are_those_of_vlmevalkit(name: str) -> None:
    dataset = DATASETS[name]
    items = {str(item["index"]): item for item in read_set(name)}
    for row in load("prompts")["image"][name]:
        num_images = count_images(name, row["index"])
        assert sorted(size for prompt in row["prompts"] for size in prompt["sizes"]) == sorted(SIZES)
        for prompt in row["prompts"]:
            for size in prompt["sizes"]:
                assert dataset.ask
                text = dataset.ask(items[row["index"]], dataset.make_style(size))
                placed = place_images(text, num_images, numbered=dataset.has_numbered_images)
                assert placed.query == prompt["query"]
                assert name_images(row["index"], placed.images, num_images) == prompt["images"]
                assert dataset.max_tiles_per_image(len(placed.images), ScoringRules()) == prompt["max_partition"]


@cache
def read_images(name: str) -> dict[str, str]:
    """Return {index: cell} of the column of images."""
    header, *rows = [row.cells for row in stream_rows(GOLDEN / f"{name}.tsv")]
    return {cells[header.index("index")]: cells[header.index("image")] for cells in rows}


def count_images(name: str, index: str) -> int:
    cell = read_images(name)[index]
    return len(ast.literal_eval(cell)) if cell.startswith("[") else 1


def name_images(index: str, places: tuple[int, ...], num_images: int) -> list[str]:
    """Return the names that VLMEvalKit gives to an item's images."""
    return [f"{index}_{place}.png" if num_images > 1 else f"{index}.png" for place in places]


@pytest.mark.parametrize("name", load("prompts")["video"])
def test_video_prompts_are_those_of_vlmevalkit(name: str) -> None:
    ask = DATASETS[name].ask_about_video
    items = {str(item["index"]): item for item in read_set(name)}
    assert ask
    for row in load("prompts")["video"][name]:
        for prompt in row["prompts"]:
            assert ask(items[row["index"]], len(prompt["images"])) == prompt["query"]


def test_frames_are_those_of_vlmevalkit() -> None:
    frames = load("video")["frames"]
    for case in frames["uniform"]:
        assert spread_evenly(case["num_frames"], case["nframe"]) == case["indices"]
    for case in frames["fps"]:
        assert take_per_second(case["num_frames"], case["video_fps"], case["fps"]) == case["indices"]
    for case in frames["MVBench"]:
        bounds_s = tuple(case["bound"]) if case["bound"] else None
        found = split_in_segments(case["max_frame"], len(case["indices"]), case["fps"], bounds_s, case["first_idx"])
        assert found == case["indices"]
    for case in frames["MVBench_MP4"]:
        assert split_in_segments(case["max_frame"], case["nframe"]) == case["indices"]


def test_subtitles_are_those_of_vlmevalkit() -> None:
    given = load("video")["subtitles"]
    for case in given["cases"]:
        assert select_subtitles(given["srt"], case["indices"], case["video_fps"]) == case["subtitles"]
    with pytest.raises(ValueError, match="no subtitles"):
        select_subtitles("what is this", [1], 25.0)


def test_summaries_of_judged_answers_are_those_of_vlmevalkit() -> None:
    data = load("aggregates")
    assert is_equal(summarize_mmvet(data["MMVet"]["rows"]), data["MMVet"]["table"])
    assert is_equal(summarize_mmvet(data["MMVet"]["rows"], by_combination=True), data["MMVet"]["fine"])
    assert summarize_mmbench_video(data["MMBench-Video"]["rows"]) == data["MMBench-Video"]["table"]
    assert summarize_mlvu(data["MLVU"]["correct_and_count_or_sum"], ScoringRules()) == data["MLVU"]["table"]
    found = summarize_temp_compass(data["TempCompass"]["correct_and_count"])
    assert is_equal(found, data["TempCompass"]["table"])


def test_the_mean_of_mlvu_left_out_a_task_in_2025() -> None:
    counts = {"plotQA": [3, 4], "order": [0, 4]}
    means = {version: summarize_mlvu(counts, ScoringRules(version))[-1]["acc"] for version in VERSIONS}
    assert means == {"2026-08": 37.5, "2025-02": 75.0}


def test_several_images_had_more_tiles_in_2025() -> None:
    dataset = DATASETS["MMMU_DEV_VAL"]
    tiles = [[dataset.max_tiles_per_image(n, ScoringRules(version)) for n in (1, 2, 5, 20)] for version in VERSIONS]
    assert tiles == [[9, 6, 2, 1], [9, 9, 9, 9]]
    assert DATASETS["MTVQA_TEST"].max_tiles_per_image(3, ScoringRules()) == 12


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("So 2. The Answer IS: B. the answer is C", "B. the answer is C"),
        ("the answer is:: B \n", "B"),
        ("I do not know", "I do not know"),
    ],
)
def test_only_answers_with_reasoning_are_cut(answer: str, kept: str) -> None:
    item = {"question": "Why?", "A": "a"}
    choice = DATASETS["MMStar"]
    assert choice.ask
    assert cut_reasoning(choice.ask(item, choice.make_style("8B")), answer) == kept
    assert cut_reasoning(choice.ask(item, choice.make_style("1B")), answer) == answer


def test_the_table_has_the_published_benchmarks() -> None:
    assert len(BENCHMARKS) == 20 and all(len(benchmark.published) == len(SIZES) for benchmark in BENCHMARKS)
    assert len(DATASETS) == sum(len(benchmark.datasets) for benchmark in BENCHMARKS) >= 30
    assert all(
        dataset.md5 and (dataset.ask is None) != (dataset.ask_about_video is None) for dataset in DATASETS.values()
    )
    assert BENCHMARKS[0].get_published("8B") == "83.6"
    with pytest.raises(ValueError, match="did you mean MMStar"):
        get_dataset("mmstar")


@every_set
def test_the_headline_is_the_mean_over_all_rows(name: str) -> None:
    """Except where the benchmark's own rule says otherwise: figures, points of 1,000 items, one split."""
    scores = score(name, ScoringRules())
    found = DATASETS[name].headline(scores.table, ScoringRules())
    values = [row[-1] if isinstance(row, list) else row for row in scores.rows.values()]
    wanted = {"HallusionBench": 28.98, "OCRBench": sum(values) / 10, "MMMU_DEV_VAL": 27.5}
    assert found == pytest.approx(wanted.get(name, 100 * sum(values) / len(values)), abs=0.05)


def run_score(tmp_path: Path, *arguments: str | Path, name: str = "MMStar") -> int:
    return evaluate.main(["score", name, *map(str, arguments), str(tmp_path / "scores.json")])


@every_set
def test_the_command_writes_rows_and_table(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, predictions = GOLDEN / f"{name}.tsv", GOLDEN / f"{name}.predictions.jsonl"
    assert run_score(tmp_path, data, predictions, "--kit-artefacts", "--rules=2025-02", name=name) == 0
    out, err = capsys.readouterr()
    report, content = json.loads(out), json.loads((tmp_path / "scores.json").read_text())
    rows, table = read_expected(name, "2025-02")
    assert content["rows"] == rows and is_equal(content["table"], table)
    assert report["score"] == content["score"] and report["rules"] == content["rules"]["version"] == "2025-02"
    assert report["unread"] == content["unread"]["count"] and len(content["unread"]["examples"]) <= 5
    assert err.count("\n") == 1 and content["md5"] in err and content["published_md5"][0] in err  # invented data


@pytest.mark.parametrize("suffix", ["tsv", "xlsx"])
def test_predictions_come_in_three_formats(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [json.loads(line) for line in (GOLDEN / "MMStar.predictions.jsonl").read_text().splitlines()]
    file = write_answers(tmp_path / f"predictions.{suffix}", answers)
    assert run_score(tmp_path, GOLDEN / "MMStar.tsv", file) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["rows"] == read_expected("MMStar", "2026-08")[0]


def write_answers(path: Path, answers: list[Json]) -> Path:
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in [["index", "prediction"], *([answer["index"], answer["prediction"]] for answer in answers)]:
            book.active.append(row)
        book.save(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["index", "prediction"], delimiter="\t")
            writer.writeheader()
            writer.writerows(answers)
    return path


QUESTION = {"index": "1", "question": "Which?", "A": "a dog", "B": "a cat", "answer": "B", "image": "x" * 99}


def write_tsv(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in QUESTION.items() if name not in names}


REFUSED: dict[str, tuple[list[dict[str, str]], list[Json], str]] = {
    "no question": ([without("question")], [{"index": 1, "prediction": "B"}], "has no column question"),
    "no answers": ([without("answer")], [{"index": 1, "prediction": "B"}], "only the organisers"),
    "an index twice": ([QUESTION, QUESTION], [{"index": 1, "prediction": "B"}], "same index"),
    "a missing prediction": ([QUESTION, {**QUESTION, "index": "2"}], [{"index": 1, "prediction": "B"}], "such as 2"),
    "a prediction twice": ([QUESTION], [{"index": 1, "prediction": "B"}] * 2, "several predictions"),
    "other columns": ([QUESTION], [{"id": 1, "answer": "B"}], "row 1"),
    "no object": ([QUESTION], ["B"], "row 1"),  # type: ignore[list-item]
    "a list as prediction": ([QUESTION], [{"index": 1, "prediction": ["B"]}], "['B'], not a text"),
    "a prediction for no item": ([QUESTION], [{"index": i, "prediction": "B"} for i in (1, 7)], "such as 7"),
    "no options": ([without("A", "B")], [{"index": 1, "prediction": "B"}], "the columns A, B, C ... are missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_in_a_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, answers, message = REFUSED[case]
    data = write_tsv(tmp_path / "MMStar.tsv", *rows)
    assert run_score(tmp_path, data, write_answers(tmp_path / "p.jsonl", answers)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "scores.json").exists()


def test_an_index_without_figure_is_named() -> None:
    scorer = DATASETS["HallusionBench"].scorer
    assert scorer
    item = {"index": "7", "question": "?", "answer": "Yes", "category": "a", "l2-category": "b"}
    with pytest.raises(ValueError, match="the index 7 names no set, figure and question"):
        scorer([item], {"7": "Yes"}, ScoringRules())


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\ufeff"])
def test_a_prediction_may_hold_any_line_separator(mark: str, tmp_path: Path) -> None:
    answers = [{"index": 1, "prediction": f"B{mark}because"}, {"index": 2, "prediction": mark}]
    lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), "utf-8")
    assert read_predictions(str(tmp_path / "p.jsonl")) == {"1": f"B{mark}because", "2": mark}


MVBENCH_ITEM = {"task_type": "x", "candidates": "['a cat', 'a dog']", "answer": "a dog"}
DOUBTFUL: list[tuple[str, Json, str | None, str]] = [
    ("MMStar", {**QUESTION, "answer": "E"}, "E", "the expected answer 'E' is none of the options"),
    ("MMStar", {**QUESTION, "A": "an", "answer": "A"}, None, 'the empty answer was read as the text "nan"'),
    ("MVBench", MVBENCH_ITEM, "( A ) a cat", 'its first word is a substring of "(x)", whatever follows'),
    ("MVBench", {**MVBENCH_ITEM, "answer": "a cow"}, "a", "the expected answer 'a cow' is none of the options"),
    ("MVBench", MVBENCH_ITEM, "( B ) a dog", ""),
    ("MMStar", QUESTION, "B", ""),
]


@pytest.mark.parametrize(("name", "item", "answer", "reason"), DOUBTFUL)
def test_what_was_probably_misread_is_listed(name: str, item: Json, answer: str | None, reason: str) -> None:
    rows = [{"question": "Which?", **item, "index": 1}]
    assert describe_scores(DATASETS[name], rows, {"1": answer}, ScoringRules())["doubtful"] == (
        {"1": reason} if reason else {}
    )


@every_set
def test_only_options_that_vanish_in_pandas_make_an_expected_answer_impossible(name: str) -> None:
    """In the file of AI2D the text of some right options is "None"."""
    answers = read_predictions(str(GOLDEN / f"{name}.predictions.jsonl"))
    doubtful = describe_scores(DATASETS[name], read_set(name), answers, ScoringRules())["doubtful"]
    assert any("none of the options" in reason for reason in doubtful.values()) == (name == "AI2D_TEST")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "as a TSV file"),
        (b"index\tquestion\n", "has no rows"),
        (b"index\tquestion\n1\t\xff\n", "as a TSV file, after byte 15"),
        (b"index\tquestion\n1\ta\tb\tc\n2\ta\n1\t2\t3\t4\t5\n", "as a TSV file"),
        (b"PK\x03\x04\x00", "has no column index, question"),
    ],
)
def test_a_file_that_is_no_tsv_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_items(str(tmp_path / "a.tsv"))
    assert str(tmp_path / "a.tsv") in str(raised.value)


@pytest.mark.parametrize("file", ["nowhere.jsonl", "a.json", "broken.jsonl", "broken.xlsx", "other.tsv"])
def test_predictions_that_cannot_be_read_are_refused(file: str, tmp_path: Path) -> None:
    if "nowhere" not in file:
        (tmp_path / file).write_text("{'index': 1}")
    with pytest.raises(ValueError, match=file):
        read_predictions(str(tmp_path / file))


def test_a_benchmark_that_needs_a_judge_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_score(tmp_path, "a", "b", name="MMVet") == 2
    assert "MMVet need a judge" in capsys.readouterr().err


def test_incomplete_rotations_are_refused_or_scored_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tsv(tmp_path / "a.tsv", QUESTION)
    answers = write_answers(tmp_path / "p.jsonl", [{"index": 1, "prediction": "B"}])
    assert run_score(tmp_path, data, answers, name="MMBench_DEV_EN") == 2
    assert "question 1 has the rotations [0] of its 2 options" in capsys.readouterr().err
    assert run_score(tmp_path, data, answers, "--kit-artefacts", name="MMBench_DEV_EN") == 0
    assert json.loads((tmp_path / "scores.json").read_text())["rows"] == {"1": 1}


def test_items_without_an_image_may_lack_an_answer(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "a.tsv", QUESTION, {**QUESTION, "index": "2", "image": ""})
    assert run_score(tmp_path, data, write_answers(tmp_path / "p.jsonl", [{"index": 1, "prediction": "B"}])) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["rows"] == {"1": 1}


def test_literals_are_parsed_and_never_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    attack = f"__import__('os').rmdir('{tmp_path / 'folder'}')"
    row = {"index": "1", "question": "Which?", "answer": attack, "category": "Doc-oriented VQA"}
    data = write_tsv(tmp_path / "a.tsv", row)
    answers = write_answers(tmp_path / "p.jsonl", [{"index": 1, "prediction": "B"}])
    assert run_score(tmp_path, data, answers, name="OCRBench") == 2
    assert "is not a Python literal" in capsys.readouterr().err and (tmp_path / "folder").exists()


def test_rows_of_a_tsv_are_where_they_say(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_bytes('\ufeffindex\tquestion\n1\t"two\nlines ""quoted"""\n\n2\tä\r\n3\t\n'.encode())
    rows = list(stream_rows(file))
    wanted = [["index", "question"], ["1", 'two\nlines "quoted"'], ["2", "ä"], ["3", ""]]
    assert [row.cells for row in rows] == wanted
    content = file.read_bytes()
    for row in rows[1:]:
        [cells] = csv.reader(io.StringIO(content[row.start : row.stop].decode().strip("\n")), delimiter="\t")
        assert cells == row.cells


@pytest.mark.slow
def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    """A file of 2 GB is scored within 1 GB of address space above what Python and pandas need."""
    data = tmp_path / "MMStar.tsv"
    with data.open("w") as file:
        file.write("index\tquestion\tA\tB\tanswer\timage\n")
        for index in range(400):
            file.write(f"{index}\tWhich?\ta dog\ta cat\tB\t{'x' * 5_000_000}\n")
    answers = write_answers(tmp_path / "p.jsonl", [{"index": index, "prediction": "B"} for index in range(400)])
    measure = "import resource, sys; from jobs import evaluate; evaluate.main(sys.argv[1:]); "
    measure += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    arguments = ["score", "MMStar", str(data), str(answers), str(tmp_path / "scores.json")]
    out = subprocess.run([sys.executable, "-c", measure, *arguments], capture_output=True, text=True, cwd=ROOT).stdout
    assert int(out.splitlines()[-1]) * 1024 < 2**30


def test_the_list_shows_each_benchmark_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21 and lines[2].split()[:4] == ["MMStar", "MMStar", "1500", "optional"]
