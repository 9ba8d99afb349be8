"""The rows that a report shows: filters by typed column, links to rows, and what the page saves of them."""

from __future__ import annotations

import csv
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import schema
from pipelines.report.build import ReportOptions, write_report
from tests.support import browser
from tests.support.annotations import HOSTILE, TASKS, make_answers, make_item, write_record, write_run
from tests.support.annotations import write_rows as write_output_rows
from tests.support.pictures import write_image
from tests.support.processes import wait_for

pytestmark = pytest.mark.skipif(bool(browser.describe_missing()), reason=browser.describe_missing() or "there is one")

NAMES = ("one/a b.png", "100%.png", "käse #5?.png", HOSTILE, "=1+2", "row-5", "row-6", "row-7")
CAPTIONS = (
    *('=HYPERLINK("http://evil.example")', "+1", "-2+3", "@SUM(1)", "\tTab", 'Plain, with "quotes"\r\nand lines'),
    *("-5", "\uff1dwide"),
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight rows with kept columns of each type, and a ninth that failed."""
    directory = tmp_path_factory.mktemp("run")
    image = write_image(directory / "a.png")
    items = []
    for n, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
        record = {"colour": "red", "size": {"width": 10 * n}, "parts": []}
        answers = make_answers(count=n, caption=caption, tags=["a", f"b{n}"], record=record, sure=0.5 + n / 20)
        kept = {"price": n / 4 if n else None, "day": date(2026, 1, 1 + n), "is_new": n % 2 == 0}
        taken = datetime(2025, 6, 1 + n, 12, tzinfo=UTC)
        items.append(make_item(name, answers, images=[image], **kept, taken_at=taken, country="de" if n < 3 else "fr"))
    nothing = {"price": None, "day": None, "is_new": None, "taken_at": None, "country": None}
    items.append(make_item("bad", [], images=[image], stage="read", error="gone", **nothing))
    return write_run(directory / "out", items)


@pytest.fixture
def page(driver: Any, output: Path, tmp_path: Path) -> Any:
    written = write_report(ReportOptions(str(output), to=str(tmp_path / "page.html"))).report
    browser.open_page(driver, written)
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    return driver


def list_shown(driver: Any) -> list[int]:
    return [int(number) for number in driver.execute_script(_LIST)]


_LIST = "return [...document.querySelectorAll('.card')].map((card) => card.ariaLabel.match(/^Row (\\d+)/)[1])"


def add_filter(driver: Any, column: str) -> Any:
    """Choose a column to filter by and return the group of its fields."""
    choose(driver, "select[aria-label='Filter by column']", column)
    return driver.find_element("css selector", f".filter[aria-label='Filter {column}']")


def choose(driver: Any, selector: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    select = Select(driver.find_element("css selector", selector))
    select.select_by_visible_text(next(o.text for o in select.options if o.text.rpartition(" (")[0] == text))


def write(driver: Any, field: str, text: str) -> None:
    element = driver.find_element("css selector", f"[aria-label='{field}']")
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', { bubbles: true }))"
    driver.execute_script(script, element, text)


def click(driver: Any, text: str) -> None:
    elements = driver.find_elements("css selector", "button")
    next(element for element in elements if element.text.startswith(text)).click()


RANGES = [
    ("count", "2", "4", [2, 3, 4]),
    ("count", "6", "", [6, 7]),
    ("price", "", "0.5", [1, 2]),
    ("record.size.width", "45", "60", [5, 6]),
    ("kind confidence", "0.7", "0.8", [4, 5, 6]),
    ("day", "2026-01-02", "2026-01-03", [1, 2]),
    ("taken_at", "2025-06-07", "", [6, 7]),
]


def test_a_range_of_a_typed_column_chooses_rows(page: Any) -> None:
    for column, low, high, expected in RANGES:
        fields = add_filter(page, column).find_elements("css selector", "input")
        wanted = "date" if column in ("day", "taken_at") else "number"
        assert [field.get_attribute("type") for field in fields] == [wanted] * 2
        assert len(list_shown(page)) == 9, "an empty filter hides nothing"
        write(page, f"{column} from", low)
        write(page, f"{column} to", high)
        assert list_shown(page) == expected, column
        click(page, "Clear")


def test_values_and_several_columns_choose_rows_together(page: Any) -> None:
    add_filter(page, "country")
    choose(page, "[aria-label='country is']", "fr")
    assert list_shown(page) == [3, 4, 5, 6, 7]
    add_filter(page, "is_new")
    choose(page, "[aria-label='is_new is']", "No")
    assert list_shown(page) == [3, 5, 7]
    page.find_element("id", "search").send_keys("row-5")
    assert list_shown(page) == [5]
    page.find_element("css selector", "[aria-label='Remove the filter is_new']").click()
    click(page, "Clear")
    assert len(list_shown(page)) == 9


def test_a_bar_of_a_number_sets_the_range_of_its_column(page: Any) -> None:
    bar = page.find_element("css selector", ".columns button[title='3: 1']")
    bar.click()
    assert list_shown(page) == [3]
    assert page.find_element("css selector", "[aria-label='count from']").get_attribute("value") == "3"
    assert bar.get_attribute("aria-pressed") == "true"
    write(page, "count to", "4")
    assert list_shown(page) == [3, 4] and bar.get_attribute("aria-pressed") == "false"


def save(driver: Any, folder: Path, kind: str) -> Path:
    click(driver, kind.upper())
    wait_for(lambda: any(folder.glob(f"*.{kind}")), 20)
    [path] = folder.glob(f"*.{kind}")
    return path


def test_csv_holds_what_is_shown_and_no_formula(page: Any, tmp_path: Path) -> None:
    path = save(page, tmp_path, "csv")
    assert path.name == "out-9-rows.csv" and b"\r\n" in path.read_bytes()
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "status", "caption", "has_red", "count", "kind", "tags", "record"]
    assert [row["id"].removeprefix("'") for row in rows] == [*NAMES, "bad"]
    changed = [row["caption"] for row in rows[:-1] if row["caption"].startswith("'")]
    assert changed == [f"'{caption}" for caption in CAPTIONS if caption not in ("-5", CAPTIONS[5])]
    assert rows[4]["id"] == "'=1+2" and rows[5]["caption"] == CAPTIONS[5] and rows[6]["caption"] == "-5"
    assert json.loads(rows[2]["tags"]) == ["a", "b2"] and json.loads(rows[2]["record"])["size"] == {"width": 20}
    assert (rows[3]["count"], rows[3]["has_red"]) == ("3", "true")
    assert (rows[8]["status"], rows[8]["caption"], rows[8]["count"]) == ("error", "", "")


def test_json_holds_the_chosen_rows_with_their_types(page: Any, tmp_path: Path) -> None:
    add_filter(page, "count")
    write(page, "count from", "3")
    write(page, "count to", "4")
    first, second = json.loads(save(page, tmp_path, "json").read_text())
    assert (first["id"], first["row"], first["status"], second["id"]) == (HOSTILE, 3, "ok", "=1+2")
    assert first["answers"]["count"] == 3 and first["answers"]["has_red"] is True
    assert first["answers"]["tags"] == ["a", "b3"] and second["answers"]["caption"] == CAPTIONS[4]


def test_a_row_has_a_link_that_opens_it_again(page: Any) -> None:
    for place in range(5):
        page.find_elements("css selector", ".card")[place].click()
        link = page.find_element("css selector", "dialog .bar a").get_attribute("href")
        assert page.current_url == link and "#" in link
        page.find_element("id", "close").click()
        wait_for(lambda: "#" not in page.current_url, 20)
        page.get("about:blank")
        page.get(link)
        assert page.find_element("css selector", "dialog[open] .bar a").get_attribute("title") == NAMES[place]
        page.find_element("id", "close").click()


def test_a_link_opens_a_row_that_the_filters_hide(page: Any) -> None:
    add_filter(page, "count")
    write(page, "count to", "1")
    page.execute_script("location.hash = '#row-7'")
    wait_for(lambda: bool(page.find_elements("css selector", "dialog[open]")), 20)
    assert page.find_element("css selector", "dialog .bar a").text == "row-7" and len(list_shown(page)) == 9
    page.execute_script("location.hash = ''")
    wait_for(lambda: not page.find_elements("css selector", "dialog[open]"), 20)
    page.execute_script("location.hash = '#nowhere'")
    wait_for(lambda: page.find_element("id", "notice").text == "nowhere is not on this page.", 20)
    assert page.find_element("id", "notice").text == "nowhere is not on this page."


def test_the_link_is_copied(page: Any) -> None:
    page.find_elements("css selector", ".card")[5].click()
    page.find_element("css selector", "dialog .copy").click()
    wait_for(lambda: page.find_element("css selector", "dialog .copy").text == "Copied", 20)
    assert page.find_element("css selector", "dialog .copy").text == "Copied"


def test_a_row_without_an_image_shows_its_question(driver: Any, tmp_path: Path) -> None:
    """Questions that differ from row to row are on all cards; that of a task is not repeated on each."""
    image = write_image(tmp_path / "a.png")
    own = [f"Is {n} even? {HOSTILE}" for n in range(3)]
    questions = [[TASKS[0]["prompt"], question, *(task["prompt"] for task in TASKS[2:])] for question in own]
    texts = [make_item(f"text-{n}", make_answers(), questions=questions[n], num_images=0) for n in (0, 1)]
    pictured = make_item("pictured", make_answers(), images=[image], questions=questions[2])
    output = write_run(tmp_path / "out", [*texts, pictured])
    browser.open_page(driver, write_report(ReportOptions(str(output))).report)
    read = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
    assert driver.execute_script(read, ".asked span") == own[:2]
    assert driver.execute_script(read, ".card .question") == own[2:]
    choose_option = "const s = document.querySelector('[aria-label=Task]'); s.value = 'caption'; s.dispatchEvent("
    driver.execute_script(f"{choose_option}new Event('change'))")
    assert driver.execute_script(read, ".asked span") == ["Describe the image."] * 2
    driver.find_element("css selector", ".card").click()
    asked = driver.execute_script(read, "dialog .prompt")
    assert asked[:3] == ["Describe the image.", own[0], "How many objects are there?"]


def test_a_caption_without_an_image_shows_its_question(driver: Any, tmp_path: Path) -> None:
    row = {**dict.fromkeys(schema.OUTPUT.names, ""), "num_images": 0, "num_tiles": 0, "num_prompt_tokens": 9}
    row |= {"status": "ok", "num_output_tokens": 3, "mean_logprob": -0.5, "frame_timestamps_s": []}
    rows = [{**row, "id": f"{n}", "prompt": f"What is {n} + {n}?", "text": f"{2 * n}"} for n in (1, 2)]
    write_output_rows(str(tmp_path), 0, pa.Table.from_pylist(rows, schema.OUTPUT))
    write_record(tmp_path, 2, [])
    browser.open_page(driver, write_report(ReportOptions(str(tmp_path))).report)
    cards = [card.text.split("\n")[:2] for card in driver.find_elements("css selector", ".card")]
    assert cards == [["What is 1 + 1?", "2"], ["What is 2 + 2?", "4"]]
