"""The demo's pictures depend only on their seed, captions are unambiguous, and held-out captions are not trained on."""

from __future__ import annotations

import re

import numpy as np
import pytest

from demo.drawings import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MANY_TILE_SIZES_PX,
    ONE_TILE_SIZES_PX,
    SHAPES,
    SIZES,
    Scene,
    is_held_out,
    make_picture,
)

_OBJECT = rf"a (?:{'|'.join(SIZES)}) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
_POSITION = r"(?:top left|top right|top|left|centre|right|bottom left|bottom right|bottom)"
_CONTENT = {
    "one": rf"{_OBJECT} at the {_POSITION}",
    "two": rf"{_OBJECT} (?:left of|above) {_OBJECT}",
    "count": rf"(?:two|three|four|five|six) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})e?s",
    "number": rf"the number [1-9]\d\d? in (?:{'|'.join(COLOURS)})",
}


def draw_scenes(count: int, held_out: bool = False) -> list[Scene]:
    return [make_picture(seed, held_out=held_out)[1] for seed in range(count)]


def test_a_seed_always_draws_the_same_picture() -> None:
    first, again, other = (make_picture(seed, held_out=True) for seed in (7, 7, 8))
    assert first[1] == again[1] != other[1]
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(again[0]))


@pytest.mark.parametrize("held_out", [False, True])
def test_the_split_is_by_caption(held_out: bool) -> None:
    assert {is_held_out(scene.caption) for scene in draw_scenes(300, held_out)} == {held_out}


def test_a_tenth_of_the_captions_is_held_out() -> None:
    captions = {f"The number {n} in {colour} on a white background." for n in range(10, 1000) for colour in COLOURS}
    assert 0.08 < np.mean([is_held_out(caption) for caption in captions]) < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_captions_follow_one_grammar(kind: str) -> None:
    pattern = re.compile(rf"{_CONTENT[kind]} on a (?:{'|'.join(BACKGROUNDS)}) background\.", re.IGNORECASE)
    captions = [scene.caption for scene in draw_scenes(800) if scene.kind == kind]
    assert captions and all(pattern.fullmatch(caption) for caption in captions)


def test_captions_name_what_is_drawn() -> None:
    for scene in draw_scenes(500):
        words = scene.caption.lower()
        assert f"{scene.background} background" in words and scene.number in words
        assert all(thing.shape in words and thing.colour in words for thing in scene.things)


def test_scenes_with_equal_captions_are_equal() -> None:
    meanings: dict[str, object] = {}
    for scene in draw_scenes(3000):
        assert meanings.setdefault(scene.caption, get_meaning(scene)) == get_meaning(scene)


def test_relations_are_unambiguous() -> None:
    for scene in draw_scenes(500):
        if scene.kind == "two":
            first, second = scene.things
            along, across = abs(second.x - first.x), abs(second.y - first.y)
            assert (along > 5 * across) if "left of" in scene.caption else (across > 5 * along)
            assert second.x > first.x if "left of" in scene.caption else second.y > first.y


def test_objects_neither_touch_nor_leave_the_picture() -> None:
    for scene in draw_scenes(500):
        for i, (x, y, radius) in enumerate(circles := get_circles(scene)):
            assert min(x, y, scene.width_px - x, scene.height_px - y) > radius - 1
            assert all(max(abs(x - u), abs(y - v)) > radius + r for u, v, r in circles[:i])


@pytest.mark.parametrize(("many_tiles", "sizes"), [(False, ONE_TILE_SIZES_PX), (True, MANY_TILE_SIZES_PX)])
def test_every_size_is_drawn(many_tiles: bool, sizes: tuple[tuple[int, int], ...]) -> None:
    images = [make_picture(seed, held_out=False, many_tiles=many_tiles)[0] for seed in range(60)]
    assert {image.size for image in images} == set(sizes)
    assert all(image.mode == "RGB" for image in images)


def get_circles(scene: Scene) -> list[tuple[float, float, float]]:
    """Return (x, y, radius) of each object, in pixels."""
    width, height = scene.width_px, scene.height_px
    return [(t.x * width, t.y * height, t.scale * min(width, height) / 2) for t in scene.things]


def get_meaning(scene: Scene) -> object:
    things = [(thing.shape, thing.colour) for thing in scene.things]
    sizes = [thing.size for thing in scene.things] if scene.kind != "count" else []
    places = [(round(thing.x * 2), round(thing.y * 2)) for thing in scene.things if scene.kind == "one"]
    return scene.kind, scene.background, things, sizes, places, scene.number, scene.number_colour
