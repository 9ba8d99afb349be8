"""Take the screenshots of the pages in docs/pages: a report, a comparison and a review, wide and on a phone.

    python -m tests.support.screenshots docs/pages

The pictures are the demo's drawings. The answers are made up from what was drawn, with a mistake here and there, so
that the same screenshots can be taken without a model.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from demo.drawings import make_picture, make_questions
from pipelines.media.reference import FileRef
from pipelines.output.decisions import Decision, write_decision
from pipelines.report.build import ReportOptions, write_report
from pipelines.report.compare import write_comparison
from pipelines.review.run import start_review
from tests.support import browser
from tests.support.annotations import make_answer, make_item, write_run

COLOURS = ("white", "grey", "black")
TASKS = [
    {"name": "caption", "prompt": "Describe the image.", "answer": "text"},
    {"name": "is_so", "prompt": "{question}", "answer": "bool"},
    {"name": "count", "prompt": "How many objects are there?", "answer": {"int": {"min": 0, "max": 6}}},
    {"name": "background", "prompt": "What colour is the background?", "answer": {"choices": list(COLOURS)}},
]
SIZES_PX = {"1280": (1280, 860), "390": (390, 844)}
MAX_BYTES = 120_000
_NUM_PICTURES, _NUM_ERRORS = 46, 2


def write_answers(directory: Path, name: str, seed: int) -> Path:
    """Write a run over the same drawings for each `name`; `seed` decides where its mistakes are."""
    chance = random.Random(seed)
    items = [_make_drawn(directory, number, chance) for number in range(_NUM_PICTURES)]
    error = {"stage": "decode", "error": "truncated PNG: 1,024 of 3,310 bytes", "background_truth": None}
    lost = [
        make_item(f"pictures/{50 + n:04}.png", [], images=[FileRef("gone.png")], **error) for n in range(_NUM_ERRORS)
    ]
    return write_run(directory / name, [*items, *lost], tasks=TASKS)


def _make_drawn(directory: Path, number: int, chance: random.Random) -> Any:
    path = directory / f"{number:04}.png"
    picture, scene = make_picture(number, held_out=True)
    picture.save(path)
    true, false, count, *_ = make_questions(scene, number)
    asked = (true, false)[number % 2]
    sure = 1 - chance.random() ** 3 / 2
    is_wrong = chance.random() > sure
    colour = chance.choice(COLOURS) if is_wrong else scene.background
    yes = (asked.answer == "Yes") != (chance.random() < 0.08)
    answers = [
        make_answer(scene.caption, confidence=-chance.random() / 20),
        make_answer(yes, "Yes" if yes else "No", {"Yes": sure if yes else 1 - sure, "No": 1 - sure if yes else sure}),
        make_answer(int(count.answer) + (chance.random() < 0.1), confidence=-chance.random() / 5),
        make_answer(colour, None, {each: sure if each == colour else (1 - sure) / 2 for each in COLOURS}),
    ]
    flags = ["caption:truncated"] if chance.random() < 0.06 else []
    questions = [TASKS[0]["prompt"], asked.text, *(task["prompt"] for task in TASKS[2:])]
    return make_item(
        f"pictures/{path.name}",
        answers,
        images=[FileRef(str(path))],
        flags=flags,
        questions=questions,
        background_truth=scene.background,
    )


def write_decisions(output: Path) -> None:
    """Write what a person might have decided about the backgrounds of twenty rows."""
    chance = random.Random(7)
    for row in range(20):
        is_right = chance.random() < 0.9
        text = "black" if is_right else "grey"
        sure = 0.6 + chance.random() * 0.4
        write_decision(str(output), Decision(row, f"{row}", "background", "black", text, is_right, sure, row))


Show = Callable[[Any], None]


def _find_rows(driver: Any) -> None:
    driver.execute_script("""
        const select = document.querySelector("[aria-label='Filter by column']");
        select.value = "background confidence";
        select.dispatchEvent(new Event("change"));
        const limit = document.querySelector("[aria-label='background confidence to']");
        limit.value = 0.9;
        limit.dispatchEvent(new Event("input"));
        document.activeElement.blur();
        document.getElementById("sheet").scrollIntoView();
    """)


def _open_row(driver: Any) -> None:
    driver.execute_script("document.querySelectorAll('.card')[2].click()")


def _wait_for_pictures(driver: Any) -> None:
    driver.execute_async_script("""
        const done = arguments[0];
        (function wait() {
            const all = [...document.images].filter((one) => one.getBoundingClientRect().top < innerHeight);
            const isLoaded = document.getElementById("pictures")?.childElementCount !== 0; // of a review
            isLoaded && all.every((one) => one.complete) ? requestAnimationFrame(() => done()) : setTimeout(wait, 30);
        })();
    """)


def take_screenshots(directory: Path, to: Path) -> None:
    """Write the PNG files."""
    first, second = (write_answers(directory, name, seed) for seed, name in enumerate(("answers-1b", "answers-8b")))
    write_decisions(first)
    report = Path(write_report(ReportOptions(str(first), truths={"background": "background_truth"})).report).as_uri()
    comparison = directory / "comparison.html"
    write_comparison(str(first), str(second), str(comparison), max_rows=20, limit_s=60)
    server = start_review(str(first), tasks=("is_so", "background"), pick="uncertain", by=None, max_answers=20, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shots: list[tuple[str, str, Show | None]] = [
        ("report", report, None),
        ("rows", report, _find_rows),
        ("row", report, _open_row),
        ("comparison", comparison.as_uri(), None),
        ("review", server.url, None),
    ]
    try:
        with browser.start_chromium() as driver:
            for name, url, show in shots:
                for width, size in SIZES_PX.items():
                    browser.set_width(driver, *size)
                    browser.show(driver, url)
                    if show:
                        show(driver)
                    _wait_for_pictures(driver)
                    write_png(to / f"{name}-{width}.png", driver.get_screenshot_as_png())
    finally:
        server.shutdown()
        server.server_close()


def write_png(path: Path, png: bytes) -> None:
    """Write a screenshot with 256 colours at most. Raise ValueError if it is too large for the repository."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, "PNG", optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.screenshots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("to", type=Path, help="directory for the PNG files")
    to = parser.parse_args().to
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        take_screenshots(Path(directory), to)


if __name__ == "__main__":
    main()
