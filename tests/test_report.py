"""A report counts the rows of an output, shows a bounded and repeatable sample, and contains no foreign markup."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import report
from pipelines import schema
from pipelines.media.reference import FileRef, ImageRef, TarRef
from pipelines.monitoring.top_counts import TopCounts
from pipelines.output.manifest import ROWS_PER_FILE, write_manifest
from pipelines.report import build
from pipelines.report.answers import spread_choices
from pipelines.report.build import ReportOptions, resolve_report_uri, write_report
from pipelines.report.counts import Calibration, NumberHistogram, Spread
from pipelines.report.page import _SCRIPTS, encode_for_html
from pipelines.report.sample import hash_row_numbers
from pipelines.report.thumbnails import make_thumbnails
from pipelines.storage import store
from tests.support.annotations import (
    HOSTILE,
    TASKS,
    make_answer,
    make_answers,
    make_item,
    make_output_schema,
    write_record,
    write_rows,
    write_run,
)
from tests.support.pictures import write_image
from tests.support.roots import ROOT
from tests.support.videos import read_number, write_video

Json = dict[str, Any]


def read_data(page: Path | str) -> Json:
    """Read the data that is embedded in the page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(page).read_text("utf-8"), re.S)
    assert found
    data: Json = json.loads(found[1])
    return data


def make_report(output: Path, **options: Any) -> Json:
    return read_data(write_report(ReportOptions(str(output), **options)).report)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Write ten rows in three files: seven pictures, a video, two error rows."""
    pictures = [write_image(tmp_path / f"{i}.png", size=(64 + i, 48)) for i in range(7)]
    video = FileRef(str(write_video(tmp_path / "clip.mp4", 50)))
    rows = [
        make_item(
            f"picture-{i}",
            make_answers(
                red=i < 5,
                count=i % 3,
                sure=0.95 - i / 20,
                tags=["a", "b"][: 1 + i % 2],
                kind="square" if i == 6 else "circle",
            ),
            images=[picture],
            truth_kind="circle",
            truth_count=i % 3 if i else None,
        )
        for i, picture in enumerate(pictures)
    ]
    rows[2]["flags"] = ["caption:truncated", "record:invalid"]
    rows[2]["answers"][0]["_finish_reason"] = "length"
    rows[2]["answers"][5] = make_answer(None, '{"colour": ', -0.5)
    clip = make_item(
        "clip", make_answers(caption="A clip.", logprob=-2.0), images=[video], truth_kind=None, truth_count=None
    )
    rows.append({**clip, "frame_timestamps_s": [0.0, 0.4, 1.2]})
    for size in (123, 4567):
        error = {"stage": "decode", "error": f"truncated PNG of {size} bytes", "truth_kind": None, "truth_count": None}
        rows.append(make_item(f"bad-{size}", [], images=[FileRef(str(tmp_path / "gone.png"))], **error))
    return write_run(tmp_path / "out", rows, rows_per_file=4)


def test_counts_are_those_of_the_rows(mixed: Path) -> None:
    counted = make_report(mixed)["statistics"]
    assert [counted[name] for name in ("rows", "ok", "error", "flagged")] == [10, 8, 2, 1]
    assert counted["num_output_tokens"] == 80
    reason = {"stage": "decode", "reason": "truncated PNG of 123 bytes", "count": 2}
    assert [{name: r[name] for name in reason} for r in counted["reasons"]["top"]] == [reason]
    assert counted["flags"]["top"] == [["caption:truncated", 1], ["record:invalid", 1]]


def test_every_type_of_answer_has_a_distribution(mixed: Path) -> None:
    caption, has_red, count, kind, tags, record = make_report(mixed)["statistics"]["tasks"]
    assert caption["values"]["top"] == [["A circle.", 7], ["A clip.", 1]]
    assert caption["finish"] == {"stop": 7, "length": 1}
    assert sum(caption["length"]["bins"]) == 8 and (caption["length"]["min"], caption["length"]["max"]) == (7, 9)
    assert caption["confidence"]["mean"] == pytest.approx((7 * -0.1 - 2) / 8)
    assert has_red["values"]["top"] == [["Yes", 6], ["No", 2]]
    sure = [*(0.95 - i / 20 for i in range(7)), 0.9]
    assert has_red["confidence"]["mean"] == pytest.approx(np.mean(sure)), "confidence in the chosen answer, yes or no"
    assert dict(count["values"]["top"]) == {"0": 3, "1": 2, "2": 3}
    assert kind["choices"] == ["circle", "square", "triangle"]
    assert kind["values"]["top"] == [["circle", 7], ["square", 1]]
    assert dict(tags["values"]["top"]) == {"a": 7, "b": 3}
    assert tags["list_lengths"]["bins"] == [1, 4, 3]
    assert (record["answered"], record["unanswered"]) == (7, 1)
    fields = {field["path"]: (field["present"], field["possible"]) for field in record["fields"]}
    assert fields == {"colour": (7, 7), "size": (7, 7), "size.width": (7, 7), "parts": (7, 7), "parts[]": (14, 14)}


def test_a_truth_column_gives_accuracy_and_calibration(mixed: Path) -> None:
    data = make_report(mixed, truths={"kind": "truth_kind", "count": "truth_count"})
    kind, count = data["statistics"]["tasks"][3]["truth"], data["statistics"]["tasks"][2]["truth"]
    assert (kind["right"], kind["count"], kind["mistakes"]["top"]) == (6, 7, [[["circle", "square"], 1]])
    assert (count["right"], count["count"], count["unanswered"]) == (6, 6, 0), "rows without a truth are not counted"
    assert count["expected_error"] == pytest.approx(1 - math.exp(-0.1), abs=1e-6)
    wrong = [row["id"] for row in data["rows"] if "wrong" in row["groups"]]
    assert wrong == ["picture-6"]


def test_calibration_error_is_the_weighted_gap() -> None:
    calibration = Calibration()
    calibration.add(np.array([0.95, 0.95, 0.95, 0.95, 0.55, 1.0]), np.array([True, True, True, False, False, True]))
    assert calibration.expected_error == pytest.approx((abs(4 - 4.8) + abs(0 - 0.55)) / 6)
    assert [b["count"] for b in calibration.to_json()["bins"]] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 5]


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"kinds": "truth_kind"}, "the tasks are"),
        ({"kind": "nothing"}, "did not keep"),
        ({"tags": "truth_kind"}, "list"),
    ],
)
def test_a_truth_that_does_not_match_a_task_is_refused(mixed: Path, truth: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_report(mixed, truths=truth)


def test_rows_show_their_media(mixed: Path) -> None:
    rows = {row["id"]: row for row in make_report(mixed)["rows"]}
    assert [(i["width"], i["height"]) for i in rows["picture-3"]["media"]["images"]] == [(67, 48)]
    assert [image["time_s"] for image in rows["clip"]["media"]["images"]] == pytest.approx([0, 0.4, 1.2])
    assert rows["bad-123"]["media"] == {"missing": "No such file or directory"}


def test_pictures_are_shown_as_the_run_decoded_them(tmp_path: Path) -> None:
    """A transparent picture over the run's background, and the part of a damaged one that the run kept."""
    transparent, damaged = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGBA", (40, 30)).save(transparent)
    Image.effect_noise((200, 100), 90).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-9000])
    items = [make_item(path.name, make_answers(), images=[FileRef(str(path))]) for path in (transparent, damaged)]
    output = write_run(tmp_path / "out", [{**item, "truth_kind": None, "truth_count": None} for item in items])
    assert [read_corner(row["media"]) for row in make_report(output)["rows"]] == [(0, 0, 0), None]
    record = json.loads((output / "run.json").read_text())
    record["options"] = {"partial_images": "keep", "background": "#0000ff"}
    (output / "run.json").write_text(json.dumps(record))
    shown = [read_corner(row["media"]) for row in make_report(output)["rows"]]
    assert all(corner is not None and corner[2] > 240 and corner[0] < 20 for corner in shown)


def read_corner(media: dict[str, Any]) -> tuple[int, ...] | None:
    """Return the colour of the last pixel of the first image, None if it is missing."""
    return tuple(map(int, decode_pixels(media["images"][0]["src"])[-1, -1])) if "images" in media else None


def test_frames_are_those_that_the_model_saw(tmp_path: Path) -> None:
    video = FileRef(str(write_video(tmp_path / "clip.mp4", 50)))
    clip = {**make_item("clip", make_answers(), images=[video]), "frame_timestamps_s": [0.4, 1.2]}
    (row,) = make_report(write_run(tmp_path / "out", [clip]))["rows"]
    assert [read_number(decode_pixels(image["src"])) for image in row["media"]["images"]] == [10, 30]


def decode_pixels(source: str) -> np.ndarray:
    import base64
    import io

    assert source.startswith("data:image/webp;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_media_come_from_tars_and_missing_media_have_a_reason(tmp_path: Path) -> None:
    import tarfile

    write_image(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.getmember("a.png")
    there = TarRef(str(tmp_path / "a.tar"), member.offset_data, member.size, "a.png")
    gone = TarRef(str(tmp_path / "b.tar"), 512, 100, "a.png")
    text = FileRef(str(Path(__file__)))
    rows = [
        make_item(f"{i}", make_answers(), images=images)
        for i, images in enumerate([[there], [gone], [text], [], [there] * 20])
    ]
    output = write_run(tmp_path / "out", rows)
    shown = [row["media"] for row in make_report(output)["rows"]]
    assert len(shown[0]["images"]) == 1
    assert "No such file" in shown[1]["missing"] and "not an image" in shown[2]["missing"]
    assert shown[3] == {"missing": "this row has no image"}
    assert (len(shown[4]["images"]), shown[4]["more"]) == (16, 4)
    for file in (output / "manifest").iterdir():
        file.unlink()
    assert {row["media"]["missing"][:30] for row in make_report(output)["rows"]} == {
        "the manifest cannot be read: ["[:30]
    }


def test_media_that_take_too_long_are_left_out(mixed: Path) -> None:
    reasons = [row["media"].get("missing", "") for row in make_report(mixed, media_limit_s=0)["rows"]]
    assert reasons and all("took longer than 0 s" in reason for reason in reasons)


def test_a_captioning_run_has_one_task_and_derived_flags(tmp_path: Path) -> None:
    row = {"id": "a", "uri": "a", "prompt": "What?", "status": "ok", "stage": "", "error": "", "num_images": 1}
    row |= {"num_tiles": 1, "num_prompt_tokens": 9, "num_output_tokens": 3, "frame_timestamps_s": []}
    texts = [("A cat.", "stop"), ("A dog and", "length"), (" ", "stop")]
    rows = [{**row, "text": t, "finish_reason": why, "mean_logprob": -0.5} for t, why in texts]
    failed = {**row, "text": "", "finish_reason": "", "mean_logprob": math.nan, "status": "error", "stage": "read"}
    table = pa.Table.from_pylist([*rows, {**failed, "error": "gone"}], schema.OUTPUT)
    table = table.append_column("flags", pa.array(["green", "red", None, ""]))  # a kept column with this name
    write_rows(str(tmp_path), 0, table)
    write_record(tmp_path, 4, [])
    data = make_report(tmp_path)
    (task,) = data["statistics"]["tasks"]
    assert (task["name"], task["kind"], task["answered"]) == ("text", "text", 3)
    assert data["statistics"]["flags"]["top"] == [["text:empty", 1], ["text:truncated", 1]]
    assert [row["flags"] for row in data["rows"]] == [[], ["text:truncated"], ["text:empty"], []]
    assert {row["media"]["missing"][:12] for row in data["rows"]} == {"the manifest"}
    assert (data["kept"], data["rows"][1]["kept"]) == (["flags"], ["red"])


def test_the_sample_has_rows_of_every_group_and_does_not_depend_on_the_files(tmp_path: Path) -> None:
    rows = []
    for i in range(3000):
        row = make_item(f"r{i}", make_answers(logprob=-5.0 if i == 1234 else -0.1, sure=0.4 if i == 77 else 0.9))
        if i % 1000 == 5:
            row["flags"] = ["count:invalid"]
        rows.append(make_item(f"r{i}", [], stage="read", error=f"why {'abc'[i % 3]}") if i % 40 == 0 else row)
    one = write_run(tmp_path / "one", rows, rows_per_file=3000)
    many = write_run(tmp_path / "many", rows, rows_per_file=170)
    shown, again = (make_report(output, rows=60)["rows"] for output in (one, many))
    assert shown == again
    assert len(shown) == 60
    groups = {
        group: [row["row"] for row in shown if group in row["groups"]]
        for group in ("flagged", "errors", "unsure", "random")
    }
    assert groups["flagged"] == [5, 1005, 2005]
    assert {row["error"] for row in shown if row["status"] == "error"} == {"why a", "why b", "why c"}
    assert {1234, 77} <= set(groups["unsure"])
    assert len(groups["random"]) > 30


def test_the_random_sample_is_uniform() -> None:
    """10^5 rows in ten parts; a chi-square with 9 degrees of freedom exceeds 3.3 in 95 % and 21.7 in 1 % of cases."""
    picked = np.argsort(hash_row_numbers(np.arange(100_000)))[:5000]
    counts = np.bincount(picked // 10_000, minlength=10)
    assert 1 < ((counts - 500) ** 2 / 500).sum() < 21.7


def test_frequent_keys_are_counted_in_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    counts, frequent = TopCounts(max_keys=100), 0
    for _ in range(50):
        keys = rng.integers(1 << 40, size=500).astype(str).tolist() + ["often"] * 20
        counts.add(pa.array(keys))
        frequent += 20
        assert len(counts.to_json(1000)["top"]) <= 200
    (key, count), total = counts.list_top(1)[0], counts.total
    assert (key, total) == ("often", 50 * 520)
    assert frequent - counts.max_missed <= count <= frequent


def test_a_spread_counts_all_values_of_any_range() -> None:
    spread, values = Spread(), np.array([0, 1, 5, 31, 32, 1000, 999_999])
    for value in values:
        spread.add(np.array([value]))
    found = spread.to_json()
    assert found and sum(found["bins"]) == len(values) and len(found["bins"]) <= 32
    assert (found["min"], found["max"], found["mean"]) == (0, 999_999, pytest.approx(values.mean()))


def test_foreign_text_is_never_markup(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    row = make_item(HOSTILE, make_answers(caption=HOSTILE, tags=[HOSTILE]), images=[image], kept=HOSTILE)
    error = make_item(f"{HOSTILE} 2", [], stage="read", error=HOSTILE, kept=HOSTILE)
    output = write_run(tmp_path / "out", [row, error], tasks=[{**task, "prompt": HOSTILE} for task in TASKS])
    page = write_report(ReportOptions(str(output))).report
    text = Path(page).read_text("utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "onerror='" in text
    assert "<img" not in text and "<!--" not in text and "\u2028" not in text
    data = read_data(page)
    assert [row["id"] for row in data["rows"]] == [HOSTILE, f"{HOSTILE} 2"], "no text is lost"
    assert json.loads(encode_for_html({"a": [HOSTILE]})) == {"a": [HOSTILE]}


def test_lone_surrogates_and_control_characters_are_kept(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", [make_item("a\x00\x1b[0m\u202e", make_answers())])
    record = json.loads((output / "run.json").read_text())
    record["config"]["input"] = ["pictures/caf\udce9"]
    (output / "run.json").write_text(json.dumps(record))
    assert make_report(output)["run"]["config"]["input"] == ["pictures/caf\udce9"]


def test_signatures_and_passwords_are_not_on_the_page(tmp_path: Path) -> None:
    uri = "https://user:secret@host/a.png?X-Signature=secret"
    output = write_run(tmp_path / "out", [{**make_item(uri, make_answers()), "uri": uri}])
    assert "secret" not in Path(write_report(ReportOptions(str(output))).report).read_text()


def test_long_texts_and_many_pictures_keep_the_page_within_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(256, size=(250, 250, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    image = FileRef(str(tmp_path / "a.png"))
    rows = [make_item(f"r{i}", make_answers(caption="\U0001f600<" * 9000), images=[image] * (1 + i)) for i in range(6)]
    output = write_run(tmp_path / "out", rows)
    monkeypatch.setattr(build, "_MAX_PICTURE_BYTES", 200_000)
    monkeypatch.setattr(build, "_MAX_ROW_BYTES", 100_000)
    small = write_report(ReportOptions(str(output)))
    assert small.num_bytes < 400_000
    assert all(row["media"]["images"] for row in read_data(small.report)["rows"])


def test_pictures_that_do_not_fit_are_counted() -> None:
    pictures = [Image.new("RGB", (200, 100))] * 20
    assert make_thumbnails(pictures, 100)["images"] == [] and make_thumbnails(pictures, 100)["more"] == 20
    assert make_thumbnails(pictures, 100_000)["more"] == 4


def test_thumbnails_of_another_scale_are_never_larger_than_the_picture() -> None:
    pictures = [Image.new("RGB", (2000, 1000)), Image.new("RGB", (600, 300))]
    for picture, scale, width in zip(pictures * 2, (1.0, 1.0, 4.0, 4.0), (320, 320, 1280, 600), strict=True):
        assert [i["width"] for i in make_thumbnails([picture], 10**6, scale=scale)["images"]] == [width]


def test_an_unfinished_run_reports_its_done_and_total_rows(mixed: Path) -> None:
    sorted((mixed / "data").iterdir())[1].unlink()
    data = make_report(mixed)
    assert (data["statistics"]["rows"], data["run"]["num_rows"]) == (6, 10)


def test_the_report_lies_in_a_local_output_or_the_current_directory() -> None:
    assert resolve_report_uri(ReportOptions("/some/run")) == "/some/run/report.html"
    assert resolve_report_uri(ReportOptions("/some/run", to="x.html")) == str(Path.cwd() / "x.html")
    assert resolve_report_uri(ReportOptions("memory://bucket/run")) == str(Path.cwd() / "run-report.html")
    assert resolve_report_uri(ReportOptions("/some/run", to="memory://bucket/x.html")) == "memory://bucket/x.html"


def test_a_report_can_be_read_from_and_written_to_a_store(mixed: Path, memory_uri: str) -> None:
    for file in mixed.rglob("*.*"):
        store.write_bytes(f"{memory_uri}/run/{file.relative_to(mixed)}", file.read_bytes())
    there = write_report(ReportOptions(f"{memory_uri}/run", to=f"{memory_uri}/report.html"))
    assert (there.rows, there.shown, there.without_media) == (10, 10, 2)
    assert b"picture-3" in store.read_bytes(f"{memory_uri}/report.html")


@pytest.fixture
def memory_uri() -> Iterator[str]:
    import fsspec

    yield "memory://report"
    fsspec.filesystem("memory").store.clear()


def test_the_command_line_sets_rows_truth_and_destination(mixed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(mixed), "--rows", "5", "--truth", "kind=truth_kind", "--to", str(mixed / "other.html")]
    assert report.main(arguments) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["rows"], result["shown"], result["report"]) == (10, 5, str(mixed / "other.html"))


@pytest.mark.parametrize("arguments", [["--rows", "-1"], ["--truth", "kind"], ["--truth", "=x"]])
def test_bad_options_are_refused(mixed: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        report.main([str(mixed), *arguments])
    assert refused.value.code == 2


def test_an_output_without_a_run_or_rows_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "holds no run" in capfd.readouterr().err
    assert report.main([str(write_run(tmp_path, []))]) == 2
    assert "holds no rows yet" in capfd.readouterr().err


def test_files_that_hold_the_same_rows_are_refused(mixed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = sorted((mixed / "data").iterdir())[0]
    (mixed / "data" / "rows-copy.parquet").write_bytes(first.read_bytes())
    assert report.main([str(mixed)]) == 2
    assert "the same rows twice" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore")  # setuptools warns
def test_the_page_is_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = pytest.importorskip("setuptools.dist")
    from setuptools.config.pyprojecttoml import apply_configuration

    monkeypatch.chdir(ROOT)
    package = apply_configuration(dist.Distribution({"script_name": "setup.py"}), "pyproject.toml")
    package.command_options["egg_info"] = {"egg_base": ("test", str(tmp_path))}
    build_py = package.get_command_obj("build_py")
    build_py.ensure_finalized()
    built = {Path(name).relative_to(build_py.build_lib).as_posix() for name in build_py.get_outputs()}
    shown = {f"pipelines/report/page.{kind}" for kind in ("html", "css")}
    assert shown | {f"pipelines/report/script/{name}.js" for name in _SCRIPTS} <= built
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("pipelines/**/__init__.py")}
    assert packages <= {Path(name).parent.as_posix() for name in built}


@pytest.mark.slow
def test_a_million_rows_make_a_small_page_in_bounded_memory(tmp_path: Path) -> None:
    """Every row has all six types of answers; peak memory is the command's, which starts at about 200 MB."""
    num_rows = 1_000_000
    write_large_run(tmp_path, num_rows)
    program = (
        "import resource, sys; from jobs.report import main; code = main(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print([used.ru_maxrss * 1024, used.ru_utime + used.ru_stime]); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), "--truth", "kind=truth"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    summary, (peak_bytes, cpu_s) = (json.loads(line) for line in result.stdout.splitlines())
    print(f"{summary['num_bytes'] / 1e6:.1f} MB, peak memory {peak_bytes / 1e6:.0f} MB, {cpu_s:.0f} CPU seconds")
    assert summary["rows"] == num_rows and summary["shown"] == 300 and summary["without_media"] == 0
    assert summary["num_bytes"] < 20_000_000
    assert peak_bytes < 1 << 30


def write_large_run(output: Path, num_rows: int, rows_per_file: int = 50_000) -> None:
    """Write a run whose rows share one picture and have different answers; no two captions are equal."""
    noise = np.random.default_rng(0).integers(256, size=(600, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(output / "a.jpg")
    image = FileRef(str(output / "a.jpg"))
    rng, tables = np.random.default_rng(1), []
    table_schema = make_output_schema(TASKS, [pa.field("truth", pa.string())])
    for start in range(0, num_rows, rows_per_file):
        table = _make_large_table(rng, start, rows_per_file, table_schema)
        write_rows(str(output), start, table)
    for start in range(0, num_rows, ROWS_PER_FILE):
        rows = range(start, min(num_rows, start + ROWS_PER_FILE))
        tables.append(_make_large_manifest(rows, image))
    write_manifest(str(output), tables)
    write_record(output, num_rows, TASKS)


def _make_large_table(rng: np.random.Generator, start: int, count: int, table_schema: pa.Schema) -> pa.Table:
    numbers = np.arange(start, start + count)
    some = rng.integers(1 << 30, size=count)
    sure = rng.uniform(0.3, 1, size=count)
    kinds = np.array(["circle", "square", "triangle"])[some % 3]
    ok = some % 50 != 0
    columns: dict[str, Any] = {
        "id": [f"s3://bucket/pictures/{n:09}.jpg" for n in numbers],
        "status": np.where(ok, "ok", "error"),
        "stage": np.where(ok, "", "decode"),
        "error": [("" if good else f"truncated JPEG of {n} bytes") for good, n in zip(ok, some, strict=True)],
        "flags": [["caption:truncated"] if n % 97 == 0 else [] for n in some],
        "caption": [
            f"A picture of {n} things that are seen on {m} tables. " * 6 for n, m in zip(some, numbers, strict=True)
        ],
        "has_red": some % 2 == 0,
        "has_red_confidence": [{"Yes": p, "No": 1 - p} for p in sure],
        "count": some % 21,
        "kind": kinds,
        "kind_confidence": [{"circle": p, "square": 1 - p, "triangle": 0.0} for p in sure],
        "tags": [[f"tag {n % 5000}", f"tag {n % 50}"] for n in some],
        "record": [{"colour": f"c{n % 9}", "size": {"width": n % 640}, "parts": [f"p{n}"]} for n in some],
        "truth": np.where(some % 5 == 0, "circle", kinds),
    }
    columns["uri"] = columns["id"]
    columns["caption_text"] = columns["caption"]
    return pa.table(
        {f.name: _make_large_column(f, columns.get(f.name), count) for f in table_schema}, schema=table_schema
    )


def _make_large_column(field: pa.Field, values: Any, count: int) -> pa.Array:
    if values is not None:
        return pa.array(values, field.type)
    defaults = {pa.float32(): -0.25, pa.string(): "stop", pa.int32(): 3}
    empty: list[float] = []
    return pa.array([defaults.get(field.type, empty)] * count, field.type)


def _make_large_manifest(rows: range, image: ImageRef) -> pa.Table:
    count = len(rows)
    ids = [f"s3://bucket/pictures/{n:09}.jpg" for n in rows]
    columns = {
        "id": ids,
        "uri": ids,
        "images": [[image.to_struct()]] * count,
        "prompt": [""] * count,
        "has_own_prompt": [False] * count,
        "error": [""] * count,
    }
    return pa.table(columns, schema=schema.MANIFEST.remove(0))


def test_probabilities_in_a_list_are_those_of_a_struct() -> None:
    listed = [[{"choice": "a", "p": 0.25}, {"choice": "b", "p": 0.75}], None]
    pair = pa.struct([("choice", pa.string()), ("p", pa.float32())])
    spread = spread_choices(pa.array(listed, pa.list_(pair)), ["a", "b"])
    assert spread.to_pylist() == [{"a": 0.25, "b": 0.75}, None]


def test_integers_of_many_values_are_a_histogram(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    few = write_run(
        tmp_path / "few", [make_item(f"{n}", make_answers(count=n % 20), images=[image]) for n in range(40)]
    )
    many = [make_item(f"{n}", make_answers(count=n - 50), images=[image]) for n in range(100)]
    assert read_data(write_report(ReportOptions(str(few))).report)["statistics"]["tasks"][2]["histogram"] is None
    found = read_data(write_report(ReportOptions(str(write_run(tmp_path / "many", many)))).report)
    assert found["statistics"]["tasks"][2]["histogram"] == {
        "start": -52,
        "width": 4,
        "bins": [2, *[4] * 24, 2],
        "mean": -0.5,
        "min": -50,
        "max": 49,
    }


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("scale", [1e-9, 0.1, 1, 1e6, 1e15, 1e300])
def test_a_histogram_of_numbers_is_exact_for_any_range_and_order(is_whole: bool, scale: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000) * scale + scale / 3
    values = np.rint(values) if is_whole else values
    histogram = NumberHistogram(is_whole=is_whole)
    for part in np.split(values, 50):
        histogram.add(np.append(part, np.nan))
    found = histogram.to_json()
    assert found and len(found["bins"]) <= 33
    edges = found["start"] + found["width"] * np.arange(len(found["bins"]) + 1)
    assert found["bins"] == np.histogram(values, edges)[0].tolist()
    assert found["width"] >= 1 or not is_whole
    assert (found["min"], found["max"]) == (values.min(), values.max())
    assert found["mean"] == pytest.approx(values.mean())
    assert NumberHistogram(is_whole=is_whole).to_json() is None


def test_more_values_than_are_counted_have_an_exact_histogram(tmp_path: Path) -> None:
    task = {"name": "count", "prompt": "How many?", "answer": "int"}
    rows = [make_item(f"{n}", [make_answer(n)]) for n in range(30_000)]
    counted = make_report(write_run(tmp_path / "out", rows, tasks=[task], rows_per_file=10_000), rows=1)
    histogram = counted["statistics"]["tasks"][0]["histogram"]
    assert histogram["bins"] == [1024] * 29 + [30_000 - 29 * 1024] and histogram["mean"] == 14_999.5


def test_fractions_are_numbers(tmp_path: Path) -> None:
    task = {"name": "price", "prompt": "Price?", "answer": "float"}
    for count, has_histogram in ((60, True), (3, False)):
        rows = [make_item(f"{n}", [make_answer(n % count / 8 - 2)]) for n in range(60)]
        data = make_report(write_run(tmp_path / f"{count}", rows, tasks=[task]), truths={})
        [found] = data["statistics"]["tasks"]
        assert found["kind"] == "float" and (found["histogram"] is not None) == has_histogram
        assert found["values"]["distinct"] == count
        assert {"name": "price", "type": "number", "place": ["answers", 0, "value"]} in data["filters"]
