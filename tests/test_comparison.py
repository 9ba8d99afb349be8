"""The comparison of two runs counts what agrees, and shows what differs next to each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from pipelines.errors import RunError
from pipelines.report.compare import Compared, write_comparison
from tests.support import browser
from tests.support.annotations import HOSTILE, make_answers, make_item, write_run
from tests.support.pictures import write_image

KINDS = ("circle", "square", "triangle")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write two runs of nine and ten rows, eight of them shared; every third row differs in its kind."""
    directory = tmp_path_factory.mktemp("runs")
    image = write_image(directory / "a.png")

    def make(n: int, shift: int) -> Any:
        kind = KINDS[(n + shift * (n % 3 == 0)) % 3]
        caption = HOSTILE if n == 3 and shift else "The same."
        return make_item(f"id-{n}", make_answers(count=n, kind=kind, caption=caption), images=[image])

    failed = make_item("id-8", [], images=[image], stage="read", error="gone")
    first = write_run(directory / "first", [*(make(n, 0) for n in range(8)), failed])
    return first, write_run(directory / "second", [make(n, 1) for n in (*range(9, 0, -1), 20)])


def compare(runs: tuple[Path, Path], to: Path, max_rows: int = 300) -> Compared:
    return write_comparison(str(runs[0]), str(runs[1]), str(to), max_rows=max_rows, limit_s=60)


def test_agreement_is_counted_among_rows_of_both_runs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(runs, tmp_path / "page.html")
    assert (found.rows, found.only_first, found.only_second) == (8, 1, 2)
    assert found.agreement == {"caption": 0.857143, "has_red": 1, "count": 1, "kind": 0.714286, "tags": 1, "record": 1}
    assert found.differ == found.shown == 3  # rows 3 and 6, and row 8, which failed in the first run
    page = (tmp_path / "page.html").read_text()
    assert "71.4% agree (5 of 7; 1 answered by one run only)" in page and "(error)" in page
    assert "<script" not in page and page.count("data:image/webp") == 3
    assert compare(runs, tmp_path / "page.html", max_rows=1).shown == 1


def test_runs_without_a_common_row_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", [make_item("x", make_answers(), images=[write_image(tmp_path / "b.png")])])
    with pytest.raises(RunError, match="no id in common"):
        compare((runs[0], other), tmp_path / "page.html")
    with pytest.raises(RunError, match="holds no run"):
        compare((runs[0], tmp_path), tmp_path / "page.html")


def test_the_command_takes_two_runs(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(runs[0]), str(runs[1]), "--to", str(tmp_path / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 8


@pytest.mark.skipif(bool(browser.describe_missing()), reason=browser.describe_missing() or "there is one")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_runs_nothing(runs: tuple[Path, Path], tmp_path: Path, width: int) -> None:
    compare(runs, tmp_path / "page.html")
    with browser.start_chromium() as driver:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.open_page(driver, str(tmp_path / "page.html"))
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script("return window.hacked") is None
        assert len(driver.find_elements("css selector", "article.row")) == 3
        driver.save_screenshot(str(tmp_path / "page.png"))
