"""The report in a browser: filters, search, opened rows, keys. Foreign text never runs; the page requests nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.report import page
from pipelines.report.build import ReportOptions, write_report
from tests.support import browser
from tests.support.annotations import HOSTILE, TASKS, make_answers, make_item, write_run
from tests.support.pictures import write_image
from tests.support.processes import wait_for

pytestmark = pytest.mark.skipif(bool(browser.describe_missing()), reason=browser.describe_missing() or "there is one")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
HOSTILE_NAME = "</script><script>window.hacked=1<\\script><img src=x onerror='window.hacked=1'>.png"  # no / in a name


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twelve rows: a third red, three errors, one flagged, one whose name, answers and prompt are an attack."""
    directory = tmp_path_factory.mktemp("run")
    image = write_image(directory / HOSTILE_NAME.replace("/", "\\"))
    rows = [
        make_item(f"picture-{i}", make_answers(red=i % 3 == 0, count=i, caption=f"Sight {NUMBERS[i]}."), images=[image])
        for i in range(8)
    ]
    rows[4]["flags"] = ["caption:truncated"]
    attack = make_answers(
        red=False, caption=HOSTILE, tags=[HOSTILE], record={"colour": HOSTILE, "size": None, "parts": []}
    )
    rows.append(make_item(HOSTILE, attack, images=[image]))
    rows += [make_item(f"bad-{i}", [], stage="read", error=f"gone {'ab'[i % 2] * 3} {HOSTILE}") for i in range(3)]
    return write_run(directory / "out", rows, tasks=[{**task, "prompt": HOSTILE} for task in TASKS])


@pytest.fixture
def opened(driver: Any, output: Path) -> Any:
    written = write_report(ReportOptions(str(output), truths={})).report
    browser.take_requests(driver)
    browser.open_page(driver, written)
    return driver


def read_texts(driver: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
    found: list[str] = driver.execute_script(script, selector)
    return found


def click(driver: Any, selector: str, text: str = "") -> None:
    """Click with the mouse, as a person would; raise if another element covers it."""
    elements = driver.find_elements("css selector", selector)
    next(element for element in elements if element.text.startswith(text)).click()


def press(driver: Any, *keys: str) -> None:
    driver.switch_to.active_element.send_keys(*keys)


def list_shown(driver: Any) -> list[str]:
    return read_texts(driver, ".card .foot .name")


def test_a_filter_shows_only_its_rows(opened: Any) -> None:
    assert len(list_shown(opened)) == 12
    click(opened, ".groups button", "Errors")
    assert list_shown(opened) == ["bad-0", "bad-1", "bad-2"]
    click(opened, ".groups button", "Flagged")
    assert list_shown(opened) == ["picture-4"]
    click(opened, ".clear")
    click(opened, "#tasks .bars button", "Yes")
    assert list_shown(opened) == ["picture-0", "picture-3", "picture-6"]
    assert opened.find_element("css selector", "[aria-pressed=true][data-pick]").text.startswith("Yes")
    click(opened, ".clear")
    click(opened, "#errors button", "read: gone bbb")
    assert list_shown(opened) == ["bad-1"]
    click(opened, ".clear")
    click(opened, "select[aria-label=Flag] option", "caption:truncated")
    assert list_shown(opened) == ["picture-4"]


def test_more_rows_load_near_the_end_of_the_page(driver: Any, tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", [make_item(f"row-{i}", make_answers()) for i in range(700)])
    browser.open_page(driver, write_report(ReportOptions(str(output), rows=700)).report)
    assert len(list_shown(driver)) == 300
    for count in (600, 700):
        driver.execute_async_script(
            "const [count, done] = arguments; scrollTo(0, document.body.scrollHeight);"
            "const cards = document.getElementById('cards').children;"
            "(function wait() { cards.length >= count ? done() : setTimeout(wait, 20); })()",
            count,
        )
    assert list_shown(driver) == [f"row-{i}" for i in range(700)]
    assert not driver.find_element("id", "more").is_displayed()
    assert driver.execute_script("return document.querySelectorAll('.card')[650].dataset.at") == "650"


def test_search_finds_answers_ids_and_errors(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(opened, "/")
    press(opened, "FIVE picture")
    assert list_shown(opened) == ["picture-5"]
    press(opened, *[Keys.BACKSPACE] * 12, "gone")
    assert list_shown(opened) == ["bad-0", "bad-1", "bad-2"]
    press(opened, " nowhere")
    assert read_texts(opened, "#cards .none")[0].startswith("No row on this page matches")


def test_an_opened_row_shows_all_its_data(opened: Any) -> None:
    click(opened, ".card")
    facts = read_texts(opened, "dialog[open] .facts")[0]
    for part in (
        "picture-0",
        "Sight zero.",
        "has_red",
        "Yes",
        "0.900",
        '"width": 4',
        "prompt and 10 output tokens",
    ):
        assert part in facts
    assert opened.execute_script("return document.querySelector('dialog img').naturalWidth") == 64


def test_keys_select_open_and_close_rows(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    def see(selector: str, texts: list[str]) -> bool:
        """Return whether the page shows these texts, soon: on a busy machine it handles a key later."""
        wait_for(lambda: read_texts(opened, selector) == texts, 5)
        return read_texts(opened, selector) == texts

    opened.execute_script("document.querySelector('.card').focus()")
    press(opened, Keys.ARROW_RIGHT)
    press(opened, Keys.ENTER)
    assert see("dialog[open] .bar .name", ["picture-1"])
    press(opened, Keys.ARROW_RIGHT)
    assert see("dialog[open] .bar .name", ["picture-2"])
    press(opened, Keys.ESCAPE)
    assert see("dialog[open]", [])

    def find_focus() -> str:
        return str(opened.switch_to.active_element.get_attribute("aria-label"))

    wait_for(lambda: find_focus() == "Row 2: picture-2", 5)
    assert find_focus() == "Row 2: picture-2"


def test_foreign_text_is_shown_and_does_not_run(opened: Any) -> None:
    click(opened, ".card[data-at='8']")
    assert read_texts(opened, "dialog .bar .name") == [HOSTILE]
    assert read_texts(opened, "dialog .answer .value.text")[0] == HOSTILE
    assert json.loads(read_texts(opened, "dialog .answer pre")[-1])["colour"] == HOSTILE
    assert set(read_texts(opened, "#tasks .prompt")) == {HOSTILE}
    assert HOSTILE in read_texts(opened, "#errors .name")[0]
    assert opened.execute_script("return [window.hacked, document.scripts.length]") == [None, 2]
    assert [
        image for image in opened.find_elements("css selector", "img") if image.get_attribute("src")[:5] != "data:"
    ] == []
    assert not [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_page_makes_no_requests(opened: Any) -> None:
    click(opened, ".card")
    (own, *others) = browser.take_requests(opened)
    assert own.endswith("/report.html") and own.startswith("file:")
    assert all(url.startswith("data:") for url in others), others


def test_unescaped_markup_would_not_run_either(
    driver: Any, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "encode_for_html", json.dumps)
    written = write_report(ReportOptions(str(output), to=str(tmp_path / "open.html"))).report
    assert "<img src=x onerror" in Path(written).read_text()
    browser.take_requests(driver)
    browser.open_page(driver, written)
    injected = "return [document.scripts[1].textContent.startsWith('window.hacked'), document.images.length]"
    assert driver.execute_script(injected) == [True, 1], "the markup is on the page"
    assert driver.execute_script("return window.hacked") is None
    assert len([url for url in browser.take_requests(driver) if not url.startswith("data:")]) == 1
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_dark_or_light_scheme(driver: Any, output: Path, dark: bool) -> None:
    written = write_report(ReportOptions(str(output))).report
    browser.open_page(driver, written, dark=dark)
    colours = (
        "return ['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g)[0])"
    )
    background, ink = map(int, driver.execute_script(colours))
    assert (background < 60 and ink > 200) if dark else (background > 200 and ink < 60)


def test_the_fifteen_most_frequent_reasons_are_shown_and_the_others_folded(driver: Any, tmp_path: Path) -> None:
    names = [f"{a}{b}" for a in "abcde" for b in "vwxyz"]
    rows = [
        make_item(f"bad-{name}-{i}", [], stage="decode", error=f"unsupported format {name}")
        for place, name in enumerate(names)
        for i in range(2 if place < 15 else 1)
    ]
    output = write_run(tmp_path / "out", rows, tasks=TASKS)
    browser.open_page(driver, write_report(ReportOptions(str(output), truths={})).report)
    assert len(read_texts(driver, "#errors .panel > .bars > *")) == 15
    assert read_texts(driver, "#errors details summary") == ["10 more reasons"]
    click(driver, "#errors summary")
    click(driver, "#errors details .bars button", "decode: unsupported format ez")
    assert list_shown(driver) == ["bad-ez-0"]
