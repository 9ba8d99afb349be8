"""Requests have the original's ids and tiles, from either checkpoint layout, without torch."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import sklearn  # type: ignore[import-untyped]
from PIL import Image

from ovis_model.config import Layout
from ovis_model.inputs.processor import Processor
from ovis_model.types import IMAGE_ATOM_ID
from pipelines.errors import MediaError
from pipelines.media.images import decode_image
from tests.support.golden_data import CHECKPOINTS, LAYOUTS, checkpoint_dir, draw_picture, load_expected

EVERY_CHECKPOINT = [(checkpoint, layout) for checkpoint in CHECKPOINTS for layout in LAYOUTS]
SUFFIXES = {".png", ".jpg", ".gif", ".tif"}
NOT_A_PICTURE = "multipage_rgb.tif"  # planes of 64-bit floats
PHOTOS = sorted(
    path
    for directory in (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    )
    for path in directory.iterdir()
    if path.suffix in SUFFIXES and path.name != NOT_A_PICTURE
)


@cache
def load_processor(checkpoint: str = CHECKPOINTS[0], layout: Layout = "aidc") -> Processor:
    return Processor.from_pretrained(str(checkpoint_dir(checkpoint, layout)))


def get_max_tiles(case: dict[str, Any]) -> int:
    return case["max_partition"] or 9


@pytest.mark.parametrize(("checkpoint", "layout"), EVERY_CHECKPOINT)
def test_prompts_are_the_originals(checkpoint: str, layout: Layout) -> None:
    cases = load_expected(checkpoint)["generation"]
    assert len(cases) == 8
    for case in cases:
        images = [draw_picture(image) for image in case["images"]]
        ids = load_processor(checkpoint, layout).encode_prompt(
            case["query"], [i.size for i in images], get_max_tiles(case)
        )
        request = load_processor(checkpoint, layout).build_request(case["query"], images, get_max_tiles(case))
        assert ids == case["input_ids"], case["kind"]
        assert len(request.input_ids) == case["num_prompt_tokens"]
        assert len(request.tiles) == len(request.tile_sizes) == case["num_crops"]


@pytest.mark.parametrize(("checkpoint", "layout"), EVERY_CHECKPOINT)
def test_requests_hold_one_atom_per_visual_token(checkpoint: str, layout: Layout) -> None:
    own = load_processor(checkpoint, layout)
    for case in load_expected(checkpoint)["preprocessing"]:
        request = own.build_request("What is it?", [draw_picture(case)], case["max_partition"])
        assert len(request.tiles) == case["num_crops"]
        placeholders = own.encode_prompt("What is it?", [(case["width"], case["height"])], case["max_partition"])
        assert [i for i in placeholders if i < 0] == case["placeholders"]
        atoms = int((request.input_ids == IMAGE_ATOM_ID).sum())
        assert atoms == case["num_crops"] * own.config.vision.tokens_per_tile


@pytest.mark.parametrize(("checkpoint", "layout"), EVERY_CHECKPOINT)
def test_detokenize_gives_the_originals_text(checkpoint: str, layout: Layout) -> None:
    for case in load_expected(checkpoint)["generation"]:
        assert load_processor(checkpoint, layout).detokenize(case["greedy_ids"]) == case["greedy_text"]
        assert load_processor(checkpoint, layout).detokenize(np.array(case["greedy_ids"])) == case["greedy_text"]


def test_images_come_before_a_text_without_marks() -> None:
    images = [Image.new("RGB", (30, 20))] * 2
    marked = "Image 1: <image>\nImage 2: <image>\nCompare."
    assert (
        load_processor().build_request("Compare.", images).input_ids
        == load_processor().build_request(marked, images).input_ids
    ).all()


def test_marks_place_images_inside_the_text() -> None:
    ids = load_processor().encode_prompt("Is <image> like <image>?", [(30, 20), (20, 30)])
    between = ids[ids.index(-305) + 1 :]
    assert load_processor().detokenize(between[: between.index(-301)]) == " like "


def test_text_alone_has_no_tiles() -> None:
    request = load_processor().build_request("Hello")
    assert request.tiles.shape == (0, 3, 56, 56)
    assert request.tile_sizes.shape == (0, 2)
    assert request.input_ids.dtype == np.int32
    assert (request.input_ids >= 0).all()


def test_an_empty_system_prompt_does_not_become_the_default() -> None:
    assert (
        load_processor().detokenize(load_processor().encode_prompt("Hi", system_prompt="")).startswith("system\n\nuser")
    )
    assert "helpful" in load_processor().detokenize(load_processor().encode_prompt("Hi"))


def test_colour_under_transparency_is_kept() -> None:
    clear = Image.new("RGBA", (30, 20), (200, 100, 50, 0))
    tiles = load_processor().build_request("?", [clear]).tiles
    assert (tiles == load_processor().build_request("?", [Image.new("RGB", (30, 20), (200, 100, 50))]).tiles).all()


@pytest.mark.parametrize(("text", "num_images"), [("<image>", 0), ("<image> <image>", 1), ("<image>", 2)])
def test_a_wrong_number_of_marks_is_refused(text: str, num_images: int) -> None:
    with pytest.raises(ValueError, match=rf"{text.count('<image>')} <image> marks? for {num_images} images?;"):
        load_processor().build_request(text, [Image.new("RGB", (9, 9))] * num_images)


def test_zero_tiles_and_empty_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tiles=0"):
        load_processor().build_request("?", [Image.new("RGB", (9, 9))], max_tiles=0)
    with pytest.raises(ValueError, match="9 x 0 px"):
        load_processor().build_request("?", [Image.new("RGB", (9, 0))])


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (20_000, 2)])
def test_extreme_shapes_make_requests(size: tuple[int, int]) -> None:
    assert len(load_processor().build_request("?", [Image.new("RGB", size)]).tiles) == 10


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.name)
def test_real_pictures_make_requests(photo: Path) -> None:
    image = decode_image(photo.read_bytes())
    request = load_processor().build_request("Describe the image.", [image])
    assert image.mode == "RGB"
    assert request.tiles.max() > 0
    assert len(request.tiles) == len(request.tile_sizes)


def test_a_stack_of_floats_is_refused() -> None:
    with pytest.raises(MediaError, match="unsupported TIFF"):
        decode_image((Path(skimage.__file__).parent / "data" / NOT_A_PICTURE).read_bytes())


def test_the_real_pictures_have_every_mode() -> None:
    modes = {Image.open(path).mode for path in PHOTOS}
    assert len(PHOTOS) >= 25
    assert {"RGB", "RGBA", "L", "P"} <= modes


def test_the_cpu_half_runs_without_torch() -> None:
    program = f"""
import sys
from PIL import Image
from ovis_model.inputs.processor import Processor
from pipelines.media.images import decode_image
processor = Processor.from_pretrained({str(checkpoint_dir(CHECKPOINTS[0]))!r})
request = processor.build_request("What is it?", [Image.new("RGB", (90, 60))])
heavy = {{"torch", "transformers", "ray", "pyarrow"}} & set(sys.modules)
assert not heavy and processor.detokenize(request.input_ids[request.input_ids >= 0]), heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
