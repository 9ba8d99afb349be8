"""A report, a comparison and a review show what the model saw: turned, over the run's background, the same frames."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipelines.media.reference import FileRef, Window
from pipelines.output.decisions import read_decisions
from pipelines.report.build import ReportOptions, write_report
from pipelines.report.compare import write_comparison
from pipelines.review.run import start_review
from tests.support.annotations import TASKS, make_answers, make_item, write_run
from tests.support.videos import read_number, write_video

BLUE = (0, 0, 255)
TIMES_S = {"clip": [1.2, 1.6], "long": [n / 10 for n in range(20)], "failed": []}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Make rows of a turned photo, a transparent picture, a window of a video, twenty frames, and a failed window."""
    directory = tmp_path_factory.mktemp("media")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (60, 30)).save(directory / "turned.jpg", exif=exif)
    Image.new("RGBA", (40, 30)).save(directory / "clear.png")
    video = str(write_video(directory / "clip.mp4", 60))
    window = FileRef(video, window=Window(1.0, 2.0))
    images = {"turned": FileRef(str(directory / "turned.jpg")), "clear": FileRef(str(directory / "clear.png"))}
    images |= {"clip": window, "long": FileRef(video), "failed": window}
    failed = {"stage": "decode", "error": "gone"}
    return [
        make_item(
            name,
            make_answers(kind="square", count=n),
            images=[image],
            frame_timestamps_s=TIMES_S.get(name, []),
            questions=[f"{task['prompt']} Really, {name}?" for task in TASKS],
            **(failed if name == "failed" else {"stage": "", "error": ""}),
        )
        for n, (name, image) in enumerate(images.items())
    ]


def write_output(place: Path, items: Sequence[Any], background: str = "#0000ff") -> Path:
    output = write_run(place, items)
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**record, "options": {"background": background}}))
    return output


def decode(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def show_report(output: Path, tmp_path: Path) -> dict[str, list[np.ndarray]]:
    page = Path(write_report(ReportOptions(str(output), to=str(tmp_path / "page.html"))).report).read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    rows = json.loads(found[1])["rows"]
    assert {row["id"]: row["media"]["more"] for row in rows}["long"] == 4
    return {row["id"]: [decode(image["src"]) for image in row["media"]["images"]] for row in rows}


def show_comparison(output: Path, tmp_path: Path) -> dict[str, list[np.ndarray]]:
    """Compare the run with one that has other answers."""
    items = [make_item(name, make_answers(kind="circle"), frame_timestamps_s=times_s) for name, times_s in list_times()]
    other = write_output(tmp_path / "other", items)
    write_comparison(str(output), str(other), str(tmp_path / "page.html"), max_rows=9, limit_s=60)
    rows = re.findall(r"<article.*?</article>", (tmp_path / "page.html").read_text(), re.S)
    names = [unescape(re.findall(r'<p class="soft">([^<]*)</p></div>', row)[0]) for row in rows]
    assert "Which shape is it? Really, clear?" in rows[names.index("clear")]
    return {name: [decode(s) for s in re.findall(r'src="([^"]+)"', row)] for name, row in zip(names, rows, strict=True)}


def list_times() -> list[tuple[str, list[float]]]:
    return [("turned", []), ("clear", []), *TIMES_S.items()]


def show_review(output: Path, tmp_path: Path) -> dict[str, list[np.ndarray]]:
    with start_review(str(output), tasks=("kind",), pick="random", by=None, max_answers=9, port=0) as server:
        answers = server.review.describe()
        assert {answer["question"] for answer in answers} >= {"Which shape is it? Really, clear?"}
        return {
            answer["id"]: [decode(image["src"]) for image in server.review.read_pictures(answer["place"])["images"]]
            for answer in answers
        }


@pytest.mark.parametrize("show", [show_report, show_comparison, show_review])
def test_every_page_shows_what_the_model_saw(items: list[Any], tmp_path: Path, show: Any) -> None:
    seen = show(write_output(tmp_path / "out", items), tmp_path)
    assert seen["turned"][0].shape == (60, 30, 3)
    assert seen["clear"][0][0, 0].astype(int) == pytest.approx(BLUE, abs=9)
    assert [read_number(frame) for frame in seen["clip"]] == [30, 40]
    frames = [read_number(frame) for frame in seen["long"]]
    assert len(frames) == 16 and frames[0] == 0 and frames[-1] == 47, "an even choice of twenty frames"
    if "failed" in seen:  # a review shows answers only
        assert all(25 <= read_number(frame) < 50 for frame in seen["failed"])


def test_a_comparison_shows_what_both_models_saw_where_it_differs(items: list[Any], tmp_path: Path) -> None:
    output, page = write_output(tmp_path / "out", items), tmp_path / "page.html"
    others = [{**item, "answers": make_answers(kind="circle")} for item in items]
    other = write_output(tmp_path / "other", others, "#ff0000")
    write_comparison(str(output), str(other), str(page), max_rows=9, limit_s=60)
    [row] = [row for row in re.findall(r"<article.*?</article>", page.read_text(), re.S) if "Really, clear" in row]
    first, second = (decode(source)[0, 0].astype(int) for source in re.findall(r'src="([^"]+)"', row))
    assert first == pytest.approx(BLUE, abs=9) and second == pytest.approx((255, 0, 0), abs=9)


def test_parts_of_several_drivers_are_compared_and_reviewed_as_one_run(items: list[Any], tmp_path: Path) -> None:
    whole, divided = write_output(tmp_path / "whole", items), tmp_path / "divided"
    others = [{**item, "answers": make_answers(kind="circle")} for item in items]
    write_output(divided / "list", others)
    for name, part in (("part-00001-of-00002", others[:2]), ("part-00002-of-00002", others[2:])):
        write_output(divided / name, part)
    (divided / "list" / "list.json").write_text(json.dumps({"config": {}, "ends": [5]}))
    (divided / "parts.json").write_text(json.dumps({"count": 2, "num_rows": 5}))
    found = write_comparison(str(whole), str(divided), str(tmp_path / "page.html"), max_rows=9, limit_s=60)
    assert (found.rows, found.only_first, found.agreement["kind"]) == (5, 0, 0)
    with start_review(str(divided), tasks=("kind",), pick="random", by=None, max_answers=9, port=0) as server:
        places = {answer["id"]: answer["place"] for answer in server.review.describe()}
        seen = server.review.read_pictures(places["clip"])["images"]
        server.review.decide(places["clip"], "square")
    assert [read_number(decode(image["src"])) for image in seen] == [30, 40]
    assert [(d.row, d.id) for d in read_decisions(str(divided)).values()] == [(2, "clip")]
