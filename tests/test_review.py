"""A review keeps each decision at once, resumes, and its figures are in the report and in an export."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.export.options import ExportOptions
from pipelines.export.run import export_run
from pipelines.output.decisions import Decision, read_decisions, write_decision
from pipelines.report.build import ReportOptions, write_report
from pipelines.report.reviewed import compute_interval
from pipelines.review.run import start_review
from pipelines.review.server import ReviewServer
from tests.support import browser
from tests.support.annotations import make_answers, make_item, write_run
from tests.support.pictures import write_image
from tests.support.processes import wait_for
from tests.support.roots import ROOT


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Write a run of 24 rows, whose kinds become more certain; three are flagged, one is an error."""
    image = write_image(tmp_path / "a.png")
    items = []
    for n in range(24):
        flags = ["kind:repetition"] if n in (5, 6, 7) else []
        failed = {"stage": "read", "error": "gone"} if n == 23 else {}
        row = make_answers(count=n % 20, sure=0.5 + n / 60, caption=f"Sight {n}.")
        items.append(make_item(f"id-{n}", row, images=[image], flags=flags, group="ab"[n % 12 == 0], **failed))
    return write_run(tmp_path / "out", items)


@contextmanager
def serve(output: Path, **options: Any) -> Iterator[ReviewServer]:
    given: dict[str, Any] = {"tasks": ("kind",), "pick": "uncertain", "by": None, "max_answers": 20, **options}
    server = start_review(str(output), port=0, **given)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def post(url: str, **value: Any) -> int:
    request = urllib.request.Request(f"{url}decide", json.dumps(value).encode())
    try:
        with urllib.request.urlopen(request) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def list_picked(output: Path, **options: Any) -> list[int]:
    with serve(output, **options) as server:
        return [int(item["id"].removeprefix("id-")) for item in server.review.describe()]


def test_answers_are_picked_by_confidence_flags_and_column(output: Path) -> None:
    assert list_picked(output, max_answers=5) == [0, 1, 2, 3, 4]
    assert sorted(list_picked(output, pick="flagged")) == [5, 6, 7]
    assert len(list_picked(output, pick="random", max_answers=1000)) == 23
    assert list_picked(output, pick="random") == list_picked(output, pick="random") != list(range(20))
    even = list_picked(output, pick="random", by="group", max_answers=4)
    assert sorted(n % 12 == 0 for n in even) == [False, False, True, True]
    assert len(list_picked(output, tasks=(), max_answers=1000)) == 23 * 6


def test_decisions_are_kept_and_a_review_resumes(output: Path) -> None:
    with serve(output) as server:
        assert post(server.url, place=0, text="circle") == post(server.url, place=1, text="square") == 200
        assert post(server.url, place=1, text="cube") == 400  # no choice of the task
        assert post(server.url, place=99, text="circle") == post(server.url, place="x", text="") == 400
    with serve(output) as server:
        assert [item["decided"] for item in server.review.describe()][:3] == ["circle", "square", None]
        assert post(server.url, place=1, text="circle") == 200
    decisions = read_decisions(str(output))
    assert {key: decision.is_right for key, decision in decisions.items()} == {(0, "kind"): True, (1, "kind"): True}
    assert len(list((output / "review").iterdir())) == 3  # nothing is changed, only added


def test_an_answer_with_the_value_of_the_right_text_is_right(output: Path) -> None:
    compact = '{"colour":"red","size":{"width":4},"parts":["a","b"]}'
    with serve(output, tasks=("record",)) as server:
        assert server.review.describe()[0]["text"] != compact
        assert post(server.url, place=0, text=compact) == post(server.url, place=1, text='{"colour": "blue"}') == 200
    assert sorted(d.is_right for d in read_decisions(str(output)).values()) == [False, True]


def test_only_this_page_reaches_the_answers(output: Path) -> None:
    with serve(output) as server:
        assert server.server_address[0] == "127.0.0.1"
        root = server.url.rsplit("/", 2)[0]
        assert post(f"{root}/", place=0, text="circle") == post(f"{root}/guess/", place=0, text="circle") == 404
        request = urllib.request.Request(server.url, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request)
        assert not read_decisions(str(output))


def test_the_report_and_an_export_use_the_decisions(output: Path, tmp_path: Path) -> None:
    with serve(output) as server:
        for place in range(20):
            post(server.url, place=place, text="square" if place < 4 else "circle")
    [figures] = read_figures(output)
    assert (figures["task"], figures["reviewed"], figures["right"]) == ("kind", 20, 16)
    assert (figures["low"], figures["high"]) == pytest.approx((0.584, 0.919), abs=1e-3)
    for is_corrected in (False, True):
        target = tmp_path / f"rows-{is_corrected}"
        options = ExportOptions(
            output=str(output),
            target=str(target),
            format="jsonl",
            min_confidence={},
            media=False,
            corrected=is_corrected,
        )
        export_run(options)
        rows = [json.loads(line) for line in (target / "rows.jsonl").read_text().splitlines()]
        assert [row["kind"] for row in rows] == ["square"] * 4 * is_corrected + ["circle"] * (23 - 4 * is_corrected)
        assert all(row["kind_text"] == row["kind"] for row in rows)


def read_figures(output: Path) -> list[dict[str, Any]]:
    """Return what a report says about the review."""
    page = Path(write_report(ReportOptions(str(output))).report).read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    figures: list[dict[str, Any]] = json.loads(found[1])["review"]
    return figures


def test_accuracy_and_calibration_are_those_of_a_case_by_hand(output: Path) -> None:
    """Ten answers: 5 of 5 right at 0.95, 2 of 3 at 0.65, 1 of 2 at 0.35, and one right without a confidence.

    Wilson's interval of 9 of 11 is 0.523 to 0.949. The gaps are 5 - 4.75, 2 - 1.95 and 1 - 0.7, in sum 0.6 of 10.
    A first decision about answer 0 does not count.
    """
    sure = [0.95] * 5 + [0.65] * 3 + [0.35] * 2 + [math.nan]
    right = [True] * 5 + [True, True, False] + [True, False] + [True]
    write_decision(str(output), Decision(0, "id-0", "kind", "circle", "square", False, 0.95, 1))
    for row, (confidence, is_right) in enumerate(zip(sure, right, strict=True)):
        text = "circle" if is_right else "square"
        write_decision(str(output), Decision(row, f"id-{row}", "kind", "circle", text, is_right, confidence, 2 + row))
    [found] = read_figures(output)
    assert (found["right"], found["reviewed"], found["accuracy"]) == (9, 11, pytest.approx(9 / 11))
    assert (found["low"], found["high"]) == pytest.approx((0.5230, 0.9486), abs=1e-4)
    calibration = found["calibration"]
    assert calibration["expected_error"] == pytest.approx(0.06)
    used = {place / 10: (b["count"], b["right"]) for place, b in enumerate(calibration["bins"]) if b["count"]}
    assert used == {0.9: (5, 1), 0.6: (3, pytest.approx(2 / 3)), 0.3: (2, 0.5)}


def test_the_interval_is_wilsons() -> None:
    assert compute_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert compute_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


@pytest.mark.slow
@pytest.mark.skipif(bool(browser.describe_missing()), reason=browser.describe_missing() or "there is one")
def test_twenty_answers_by_keyboard_killed_and_resumed(output: Path) -> None:
    with browser.start_chromium() as driver:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        for keys, wanted in (("aa2aeaaaaa", 10), ("aaaa3aaaaa", 20)):
            process, url = start_command(output)
            driver.get(url)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
            for number, key in enumerate(keys):
                press(driver, key, wanted - 10 + number + 1)
            process.send_signal(signal.SIGKILL if wanted == 10 else signal.SIGINT)
            out, _ = process.communicate(timeout=60)
            assert sum(decision.task == "kind" for decision in read_decisions(str(output)).values()) == wanted
        assert json.loads(out.splitlines()[-1]) == {"picked": 20, "decided": 20, "output": str(output)}
    wrong = [decision.text for decision in read_decisions(str(output)).values() if not decision.is_right]
    assert sorted(wrong) == ["square", "triangle", "triangle"]
    [figures] = read_figures(output)
    assert (figures["task"], figures["right"], figures["reviewed"]) == ("kind", 17, 20)
    assert (figures["low"], figures["high"]) == pytest.approx(compute_interval(17, 20))
    with browser.start_chromium() as driver:
        browser.open_page(driver, output / "report.html")
        shown = driver.find_element("css selector", "#review .panel").text
    assert all(text in shown for text in ("17 of 20 right", "85.0", "interval 64.0", "94.8", "calibration error"))


def start_command(output: Path) -> tuple[Any, str]:
    arguments = ["review", str(output), "--task", "kind", "--pick", "uncertain", "--answers", "20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://\S+/", line):
            return process, found[0]
    raise AssertionError("the command printed no address")


def press(driver: Any, key: str, num_done: int) -> None:
    """Press a key on the page and wait until the decision is kept; `e` writes "triangle" in the editor."""
    from selenium.webdriver.common.keys import Keys

    body = driver.switch_to.active_element
    body.send_keys(key)
    if key == "e":
        editor = driver.switch_to.active_element
        editor.clear()
        editor.send_keys("triangle", Keys.CONTROL + Keys.ENTER)
    wait_for(lambda: driver.find_element("id", "progress").text.startswith(f"{num_done} of 20"), 20)
