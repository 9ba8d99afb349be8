"""Pictures that look alike form groups; those that do not, do not, and a report shows the groups."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from demo.drawings import make_picture
from pipelines.media.reference import FileRef
from pipelines.media.similarity import MAX_DISTANCE, group_similar, hash_picture
from pipelines.report.build import ReportOptions, write_report
from tests.support import browser
from tests.support.annotations import make_answers, make_item, write_run

Picture = Image.Image


def compress(picture: Picture) -> Picture:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return Image.open(file)


CHANGES = {
    "compressed": compress,
    "smaller": lambda picture: picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "grey": lambda picture: picture.convert("L"),
}


def make_scene(seed: int) -> Picture:
    """Make a picture with soft shapes, as a photo has."""
    noise = np.random.default_rng(seed).integers(256, size=(5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((420, 300), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_looks_alike(change: str) -> None:
    for seed in range(20):
        hashes = [hash_picture(picture) for picture in (make_scene(seed), CHANGES[change](make_scene(seed)))]
        assert (hashes[0] ^ hashes[1]).bit_count() <= MAX_DISTANCE


def test_other_pictures_do_not_look_alike() -> None:
    scenes = [hash_picture(make_scene(seed)) for seed in range(300)]
    assert sum(group is not None for group in group_similar(scenes)) == 0
    drawings = [hash_picture(make_picture(seed, held_out=True)[0]) for seed in range(100)]
    assert sum(group is not None for group in group_similar(drawings)) <= 20


def test_groups_are_numbered_and_do_not_chain() -> None:
    base, step = 0b1111 << 40, MAX_DISTANCE
    near, far = base ^ ((1 << step) - 1), base ^ ((1 << 2 * step) - 1)
    assert group_similar([base, 1 << 62 | 0x5555_5555, near, far]) == [0, None, 0, None]
    assert group_similar([5, 1 << 60 | 0xFFFF_FFFF, 5, 1 << 60 | 0xFFFF_FFFE]) == [0, 1, 0, 1]
    assert group_similar([]) == [] and group_similar([7]) == [None]


def test_plain_pictures_look_alike() -> None:
    plain = [Image.new("RGB", (50 + n, 40), (n, 60, 90)) for n in range(5)]
    assert group_similar([hash_picture(picture) for picture in plain]) == [0] * 5


@pytest.mark.skipif(bool(browser.describe_missing()), reason=browser.describe_missing() or "there is one")
def test_a_report_shows_similar_pictures_together(tmp_path: Path) -> None:
    items = []
    for n in range(6):  # 0 and 4, 1 and 5 are alike
        path = tmp_path / f"{n}.png"
        (make_scene(n % 4) if n < 4 else CHANGES["smaller"](make_scene(n % 4))).save(path)
        items.append(make_item(f"id-{n}", make_answers(), images=[FileRef(str(path))]))
    items.append(make_item("gone", [], images=[FileRef(str(tmp_path / "gone.png"))], stage="read", error="gone"))
    page = write_report(ReportOptions(str(write_run(tmp_path / "out", items)))).report
    with browser.start_chromium() as driver:
        browser.open_page(driver, page)
        driver.find_element("css selector", "[data-group=similar]").click()
        assert read(driver, ".card .foot .name") == ["id-0", "id-4", "id-1", "id-5"]
        driver.find_elements("css selector", ".card")[1].click()
        link = driver.find_element("css selector", "dialog .links a")
        assert link.text == "id-0"
        link.click()
        assert driver.find_element("css selector", "dialog .bar a").text == "id-0"


def read(driver: Any, selector: str) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", selector)]
