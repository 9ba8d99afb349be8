"""The pages of a report, a comparison and a review are readable for everyone: contrast, narrow screens, keys."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.output.decisions import Decision, write_decision
from pipelines.report.build import ReportOptions, write_report
from pipelines.report.compare import write_comparison
from pipelines.review.run import start_review
from tests.support import browser
from tests.support.annotations import make_answers, make_item, write_run
from tests.support.contrast import find_weak, measure_contrasts
from tests.support.pictures import write_image
from tests.support.processes import wait_for
from tests.support.roots import ROOT
from tests.support.screenshots import MAX_BYTES, take_screenshots

pytestmark = pytest.mark.skipif(bool(browser.describe_missing()), reason=browser.describe_missing() or "there is one")

Open = Callable[[Any, bool], None]


def write_rows(directory: Path, shift: int) -> Path:
    """Write a run with all that a page can show: long names, flags, errors, wrong and missing answers."""
    image = write_image(directory / "a.png")
    items = []
    for n in range(30):
        answers = make_answers(
            red=n % 2 == 0,
            count=n * 3 + shift,
            sure=0.4 + n / 60,
            caption="A very long sentence. " * n,
            tags=["a", "b"],
        )
        answers[5]["_finish_reason"] = "length"
        flags = ["caption:truncated", "kind:repetition"] if n % 4 == 0 else []
        name = f"a-directory/with-a-long-name-{'x' * 60}/{n:03}.png"
        items.append(make_item(name, answers, images=[image], flags=flags, truth=str(n), price=n / 7))
    reason = "cannot identify image file of 12 bytes in/a/very/long/path/without/any/space/in/it/at/all.png"
    failed = make_item("bad", [], images=[image], stage="decode", error=reason, truth=None, price=None)
    return write_run(directory / "out", [*items, failed])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Write a report, a comparison and a review, and yield their addresses."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    one, two = (str(write_rows(folder, shift)) for shift, folder in enumerate(folders))
    for row in range(8):
        write_decision(one, Decision(row, f"{row}", "kind", "circle", "circle", row > 2, 0.5, row))
    report = write_report(ReportOptions(one, truths={"count": "truth"})).report
    write_comparison(one, two, str(folders[0] / "comparison.html"), max_rows=5, limit_s=60)
    server = start_review(one, tasks=(), pick="uncertain", by=None, max_answers=20, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    comparison = (folders[0] / "comparison.html").as_uri()
    yield {"report": Path(report).as_uri(), "comparison": comparison, "review": server.url}
    server.shutdown()
    server.server_close()


SHOW = {
    "report": "document.querySelectorAll('details').forEach((one) => { one.open = true; })",
    "comparison": "",
    "review": "document.getElementById('edit').click()",
}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", SHOW)
def test_contrast_is_that_of_level_aa(driver: Any, pages: dict[str, Any], name: str, dark: bool) -> None:
    browser.set_width(driver, 1280)
    browser.show(driver, pages[name], dark=dark)
    driver.execute_script(SHOW[name])
    assert find_weak(driver) == []
    if name == "report":
        open_all_parts(driver)
        assert find_weak(driver) == []
        driver.execute_script("location.hash = '#bad'")
        wait_for(lambda: bool(driver.find_elements("css selector", "dialog[open] .error")), 20)
        assert find_weak(driver) == []


def open_all_parts(driver: Any) -> None:
    """Press a group and a bar, add filters of each kind, and open the row with most in it."""
    driver.execute_script("""
        document.querySelector("[data-group=flagged]").click();
        for (const name of ["count", "caption", "has_red"]) {
            const select = document.querySelector("[aria-label='Filter by column']");
            select.value = name;
            select.dispatchEvent(new Event("change"));
        }
        document.querySelector(".card").click();
    """)


def test_the_audit_finds_weak_text(driver: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<body style='background:#fff'><p style='color:#777'>weak</p><p style='color:#767676'>just enough</p>"
        "<div style='background:#000;opacity:.5'><p style='color:#777'>faded</p></div>"
        "<p style='color:#949494;font-size:24px'>large</p><p hidden style='color:#fff'>hidden</p>"
        "<input aria-label=name style='border:1px solid #ddd'>"
    )
    browser.open_page(driver, tmp_path / "page.html")
    assert [weak.what for weak in find_weak(driver)] == ["weak", "faded", "edge of name"]
    ratios = {found.what: found.ratio for found in measure_contrasts(driver)}
    assert ratios["weak"] == pytest.approx(4.48, abs=0.01) and ratios["just enough"] == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", SHOW)
def test_no_page_scrolls_sideways(driver: Any, pages: dict[str, Any], name: str, width: int) -> None:
    browser.set_width(driver, width)
    browser.show(driver, pages[name])
    driver.execute_script(SHOW[name])
    assert browser.find_overflow(driver) == []
    assert driver.execute_script(_BEYOND_PANELS) == []
    if name == "report":
        open_all_parts(driver)
        assert browser.find_overflow(driver) == []
        inside = "const all = [...document.querySelectorAll('dialog *')]; return all.length && Math.max(...all.map("
        assert 0 < driver.execute_script(f"{inside}(one) => one.getBoundingClientRect().right))") <= width


_BEYOND_PANELS = """
    return [...document.querySelectorAll(".panel")].flatMap((panel) => [...panel.querySelectorAll("*")]
        .filter((one) => one.getBoundingClientRect().right > panel.getBoundingClientRect().right)
        .map((one) => one.textContent));
"""


@pytest.mark.slow
def test_the_screenshots_can_be_taken_again(tmp_path: Path) -> None:
    take_screenshots(tmp_path, tmp_path)
    committed = sorted(path.name for path in (ROOT / "docs" / "pages").glob("*.png"))
    assert sorted(path.name for path in tmp_path.glob("*-[13]*0.png")) == committed


def test_the_screenshots_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "pages").glob("*.png")}
    assert len(sizes) == 10 and max(sizes.values()) <= MAX_BYTES


def press(driver: Any, *keys: str) -> None:
    driver.switch_to.active_element.send_keys(*keys)


def find_focus(driver: Any) -> str:
    found = driver.execute_script("const e = document.activeElement; return e.ariaLabel || e.id || e.tagName")
    return str(found)


def sees(driver: Any, focus: str, title: str | None = None) -> bool:
    """Return whether the focus is there and the open row is this one, soon: a busy machine handles keys later."""

    def is_there() -> bool:
        names = [bar.get_attribute("title") for bar in driver.find_elements("css selector", "dialog[open] .bar a")]
        return find_focus(driver) == focus and names == ([title] if title else [])

    wait_for(is_there, 20)
    return is_there()


def test_every_row_is_reached_by_keys(driver: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    output = write_run(tmp_path / "out", [make_item(f"id-{n}", make_answers()) for n in range(310)])
    browser.set_width(driver, 1280)
    browser.show(driver, Path(write_report(ReportOptions(str(output), rows=310)).report).as_uri())
    shown = driver.find_element("css selector", ".keys").text
    assert all(word in shown for word in ("/", "searches", "j", "k", "Enter", "Esc"))
    press(driver, "j")
    assert sees(driver, "Row 0: id-0")
    press(driver, "j")
    press(driver, Keys.ARROW_RIGHT)
    press(driver, "k")
    assert sees(driver, "Row 1: id-1")
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is visible"
    press(driver, Keys.ENTER)
    assert sees(driver, "close", "id-1")
    press(driver, "j")
    assert sees(driver, "close", "id-2")
    press(driver, Keys.ESCAPE)
    assert sees(driver, "Row 2: id-2")
    press(driver, Keys.TAB)
    assert not find_focus(driver).startswith("Row"), "one press of Tab leaves the rows"
    press(driver, "/")
    assert sees(driver, "Search")
    press(driver, "id-309 jk/", *[Keys.BACKSPACE] * 4)
    press(driver, Keys.ENTER)
    assert sees(driver, "Row 309: id-309"), "keys are text in a field, and Enter leads to what was found"
    driver.execute_script("location.hash = '#id-305'")
    press(driver, "k")
    assert sees(driver, "close", "id-304")
    press(driver, Keys.ESCAPE)
    assert sees(driver, "Row 304: id-304"), "rows beyond the first cards are added where they are needed"
