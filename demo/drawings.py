"""Draw small pictures from a seed, each with exactly one true caption.

    A small red star at the top left on a white background.        one object, nine positions
    A large red cross left of a small blue heart on a black background.     two objects, left of or above
    Four green triangles on a grey background.                     two to six equal objects
    The number 385 in purple on a white background.                two or three digits

The hash of a caption decides whether it is held out: a tenth of all captions is never trained on. `make_questions`
asks about a scene; each question has one true answer of a word or a digit, and a number does not count as an object.
Knows nothing of models: Pillow and numpy only.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 215, 40),
    "green": (35, 160, 60),
    "blue": (40, 80, 225),
    "purple": (140, 45, 175),
}
BACKGROUNDS = {"white": (246, 246, 246), "grey": (150, 150, 150), "black": (14, 14, 14)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = {"small": (0.20, 0.22), "large": (0.36, 0.38)}
"""Width of an object as a share of the picture's short side: the range it is drawn from."""
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
COUNTS = ("Two", "Three", "Four", "Five", "Six")
RELATIONS = ("left of", "above")
DIRECTIONS = ("right", "left", "down", "up")

ONE_TILE_SIZES_PX = ((84, 84), (84, 63), (63, 84))
"""(width, height) of images that fit into one 84 px tile."""
MANY_TILE_SIZES_PX = ((126, 84), (84, 126), (168, 168), (168, 126), (126, 168), (252, 168))
"""(width, height) of images that Ovis2's rule cuts into 2, 4 or 6 tiles in addition to the overview."""

Colour = tuple[int, int, int]
Kind = Literal["one", "two", "count", "number"]
KINDS: tuple[Kind, ...] = ("one", "two", "count", "number")
QuestionKind = Literal["bool", "count", "choice"]
NUM_QUESTIONS = 6
"""Number of questions that `make_questions` asks about each scene."""

_CENTRES = (0.21, 0.5, 0.79)  # centres of the three columns and rows, as shares of the width and height
_PAIR_CENTRES = (0.27, 0.73)
_JITTER = 0.02
_SUPERSAMPLING = 3  # scenes are drawn this much larger and averaged, which smooths edges
_HELD_OUT_OF_256 = 26
_QUESTIONS_STREAM = 2  # 0 and 1 are the random streams of the images
_YES_NO = ("Yes", "No")
_DIGITS = tuple(str(i) for i in range(len(COUNTS) + 2))


@dataclass(frozen=True)
class Thing:
    """One object: its centre (`x`, `y`) in shares of width and height, its width in shares of the short side."""

    shape: str
    size: str
    colour: str
    x: float
    y: float
    scale: float


@dataclass(frozen=True)
class Scene:
    """What an image shows: either `things` or a `number`; the other one is empty."""

    kind: Kind
    caption: str
    background: str
    width_px: int
    height_px: int
    things: tuple[Thing, ...] = ()
    number: str = ""
    number_colour: str = ""


@dataclass(frozen=True)
class MovingThing:
    """The frames of a clip, the object in the first one, and where it moves."""

    frames: list[Image.Image]
    thing: Thing
    direction: str


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene; `answer` is the only true one of `choices`."""

    kind: QuestionKind
    text: str
    answer: str
    choices: tuple[str, ...]


def is_held_out(caption: str) -> bool:
    """Return whether images with this caption are kept out of training."""
    return hashlib.sha256(caption.encode()).digest()[0] < _HELD_OUT_OF_256


def make_picture(
    seed: int, *, held_out: bool, kind: Kind | None = None, many_tiles: bool | None = None
) -> tuple[Image.Image, Scene]:
    """Return the image and the scene of a seed, which also chooses the kind and the tiles if they are None."""
    rng = np.random.default_rng([seed, int(held_out)])
    scene = _sample_scene(rng, kind)
    while is_held_out(scene.caption) is not held_out:
        scene = _sample_scene(rng, kind)
    is_cut = bool(rng.random() < 0.25) if many_tiles is None else many_tiles
    sizes = MANY_TILE_SIZES_PX if is_cut else ONE_TILE_SIZES_PX
    width_px, height_px = sizes[rng.integers(len(sizes))]
    scene = replace(scene, width_px=width_px, height_px=height_px)
    return draw(scene, rng), scene


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Return an RGB image of the scene's size; `rng` varies colours and pixels slightly."""
    size = (scene.width_px * _SUPERSAMPLING, scene.height_px * _SUPERSAMPLING)
    canvas = Image.new("RGB", size, _vary(BACKGROUNDS[scene.background], rng))
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        pen.polygon(_trace_outline(thing, *size), fill=_vary(COLOURS[thing.colour], rng))
    if scene.number:
        _draw_number(pen, scene, _vary(COLOURS[scene.number_colour], rng), *size)
    return _add_noise(canvas.reduce(_SUPERSAMPLING), rng)


def make_scattered_picture(seed: int, *, held_out: bool) -> tuple[Image.Image, Scene]:
    """Return an image of four to nine different small objects in some of nine cells; its caption lists nothing."""
    rng = np.random.default_rng([seed, int(held_out), 1])
    cells = sorted(rng.choice(9, size=int(rng.integers(4, 10)), replace=False))
    things = tuple(_sample_thing(rng, _CENTRES[i % 3], _CENTRES[i // 3], size="small") for i in cells)
    width_px, height_px = ONE_TILE_SIZES_PX[rng.integers(len(ONE_TILE_SIZES_PX))]
    scene = replace(_make_scene("count", "Objects", rng, things), width_px=width_px, height_px=height_px)
    return draw(scene, rng), scene


def make_clip(seed: int, *, held_out: bool, num_frames: int) -> MovingThing:
    """Return frames of one object that crosses the image."""
    rng = np.random.default_rng([seed, int(held_out), 2])
    thing, direction = _sample_thing(rng, 0, 0), _pick(rng, DIRECTIONS)
    while is_held_out(f"{_describe(thing)} moves {direction}") is not held_out:
        thing, direction = _sample_thing(rng, 0, 0), _pick(rng, DIRECTIONS)
    across, background = float(rng.uniform(0.35, 0.65)), _pick(rng, tuple(BACKGROUNDS))
    path = np.linspace(0.25, 0.75, num_frames) + rng.uniform(-_JITTER, _JITTER, num_frames)
    path = path if direction in ("right", "down") else 1 - path
    is_level = direction in ("left", "right")
    things = [replace(thing, x=at if is_level else across, y=across if is_level else at) for at in path.tolist()]
    scenes = [Scene("one", "", background, *ONE_TILE_SIZES_PX[0], (moved,)) for moved in things]
    seed_of_noise = int(rng.integers(1 << 62))
    return MovingThing([draw(scene, np.random.default_rng(seed_of_noise)) for scene in scenes], things[0], direction)


def find_place(thing: Thing) -> tuple[int, int]:
    """Return the column and the row, from 0 to 2, of the cell that an object is in."""
    return _find_nearest(thing.x), _find_nearest(thing.y)


def _find_nearest(at: float) -> int:
    return min(range(len(_CENTRES)), key=lambda i: abs(at - _CENTRES[i]))


def make_questions(scene: Scene, seed: int) -> tuple[SceneQuestion, ...]:
    """Return NUM_QUESTIONS questions: one with the answer Yes, one with No, two counts and two choices.

    The object that is absent or counted as 0 often nearly exists: the colour of one object, the shape of another.
    """
    rng = np.random.default_rng([seed, _QUESTIONS_STREAM])
    choices = _list_choice_questions(scene)
    picked = rng.choice(len(choices), size=2, replace=False)
    return (
        SceneQuestion("bool", _pick(rng, _list_true(scene, rng)), "Yes", _YES_NO),
        SceneQuestion("bool", _pick(rng, _list_false(scene, rng)), "No", _YES_NO),
        SceneQuestion("count", "How many objects are there?", str(len(scene.things)), _DIGITS),
        _ask_count(scene, rng),
        *(choices[i] for i in picked),
    )


def _list_true(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    background = f"Is the background {scene.background}?"
    if scene.number:
        return "Is there a number?", f"Is the number {scene.number_colour}?", background
    thing = scene.things[rng.integers(len(scene.things))]
    return *_ask_presence(thing.colour, thing.shape), background


def _list_false(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    colour = _pick_other(rng, COLOURS, {thing.colour for thing in scene.things})
    shape = _pick_other(rng, SHAPES, {thing.shape for thing in scene.things})
    absent = (*_ask_presence(*_choose_absent_sort(scene, rng))[:2], *_ask_presence(colour, shape)[2:])
    background = f"Is the background {_pick_other(rng, BACKGROUNDS, {scene.background})}?"
    about_number = f"Is the number {_pick_other(rng, COLOURS, {scene.number_colour})}?"
    return *absent, background, about_number if scene.number else "Is there a number?"


def _ask_presence(colour: str, shape: str) -> tuple[str, ...]:
    """Return questions about an object; the first and hardest one is listed twice, so that it is drawn more often."""
    sort = f"Is there {add_article(colour)} {shape}?"
    return sort, sort, f"Is there {add_article(colour)} object?", f"Is there a {shape}?"


def _choose_absent_sort(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return a colour and a shape that no object combines; half of the time they come as close as possible."""
    there = {(thing.colour, thing.shape) for thing in scene.things}
    colours = {colour for colour, _ in there} or {scene.number_colour}
    shapes = {shape for _, shape in there}
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in there]
    nearest = max((c in colours) + (s in shapes) for c, s in absent)
    min_shared = nearest if rng.random() < 0.5 else min(nearest, 1)
    near = [(c, s) for c, s in absent if (c in colours) + (s in shapes) >= min_shared]
    return near[rng.integers(len(near))]


def _ask_count(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    """Return a question about a count; in one of three cases about objects that are absent."""
    if scene.things and rng.random() < 2 / 3:
        thing = scene.things[rng.integers(len(scene.things))]
        colour, shape = thing.colour, thing.shape
    else:
        colour, shape = _choose_absent_sort(scene, rng)
    what, number = (
        (f"{colour} {_pluralize(shape)}", sum((t.colour, t.shape) == (colour, shape) for t in scene.things)),
        (f"{colour} objects", sum(t.colour == colour for t in scene.things)),
        (_pluralize(shape), sum(t.shape == shape for t in scene.things)),
    )[rng.integers(3)]
    return SceneQuestion("count", f"How many {what} are there?", str(number), _DIGITS)


def _list_choice_questions(scene: Scene) -> list[SceneQuestion]:
    """Return every question about the scene that has exactly one right answer."""
    backgrounds, colours = tuple(BACKGROUNDS), tuple(COLOURS)
    asked = [
        SceneQuestion("choice", "What is the background?", scene.background, backgrounds),
        SceneQuestion("choice", "What colour is the background?", scene.background, backgrounds),
    ]
    if scene.number:
        return [*asked, SceneQuestion("choice", "What colour is the number?", scene.number_colour, colours)]
    asked += [SceneQuestion("choice", text, colour, colours) for text, colour in _ask_colours(scene)]
    return asked + [SceneQuestion("choice", text, shape, SHAPES) for text, shape in _ask_shapes(scene)]


def _ask_colours(scene: Scene) -> list[tuple[str, str]]:
    """Return (question, answer) for each shape that has one colour."""
    colours = _keep_unambiguous((thing.shape, thing.colour) for thing in scene.things)
    if scene.kind == "count":
        return [(f"What colour are the {_pluralize(shape)}?", colour) for shape, colour in colours.items()]
    return [(f"What colour is the {shape}?", colour) for shape, colour in colours.items()]


def _ask_shapes(scene: Scene) -> list[tuple[str, str]]:
    """Return (question, answer) for each colour that has one shape, and for places."""
    shapes = _keep_unambiguous((thing.colour, thing.shape) for thing in scene.things)
    asked = [(f"Which shape is {colour}?", shape) for colour, shape in shapes.items()]
    if scene.kind != "two":
        return [*asked, ("Which shape is it?", scene.things[0].shape)]
    places = ("on the left", "on the right") if RELATIONS[0] in scene.caption else ("at the top", "at the bottom")
    return asked + [(f"Which shape is {place}?", t.shape) for place, t in zip(places, scene.things, strict=True)]


def _keep_unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return {key: value} for the keys of `pairs` that occur with one value only."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for key, value in pairs:
        values[key].add(value)
    return {key: found.pop() for key, found in values.items() if len(found) == 1}


def _pick_other(rng: np.random.Generator, options: Iterable[str], present: Iterable[str]) -> str:
    return _pick(rng, tuple(option for option in options if option not in present))


def add_article(word: str) -> str:
    """Return the word with `a` or `an`."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _sample_scene(rng: np.random.Generator, kind: Kind | None) -> Scene:
    kind = kind or KINDS[rng.choice(len(KINDS), p=(0.25, 0.35, 0.2, 0.2))]
    return {"one": _sample_one, "two": _sample_two, "count": _sample_count, "number": _sample_number}[kind](rng)


def _sample_one(rng: np.random.Generator) -> Scene:
    row, column = (int(i) for i in rng.integers(3, size=2))
    thing = _sample_thing(rng, _CENTRES[column], _CENTRES[row])
    return _make_scene("one", f"{_describe(thing)} at the {POSITIONS[row][column]}", rng, (thing,))


def _sample_two(rng: np.random.Generator) -> Scene:
    relation = _pick(rng, RELATIONS)
    across = float(rng.uniform(0.4, 0.6))
    centres = [(along, across) if relation == "left of" else (across, along) for along in _PAIR_CENTRES]
    first, second = (_sample_thing(rng, *centre) for centre in centres)
    if (first.shape, first.colour) == (second.shape, second.colour):  # its caption would be "Two red stars"
        return _sample_two(rng)
    return _make_scene("two", f"{_describe(first)} {relation} {_describe(second).lower()}", rng, (first, second))


def _sample_count(rng: np.random.Generator) -> Scene:
    number = int(rng.integers(2, 2 + len(COUNTS)))
    like = _sample_thing(rng, 0, 0, size="small")
    cells = rng.choice(9, size=number, replace=False)
    things = tuple(_jitter(like, rng, _CENTRES[cell % 3], _CENTRES[cell // 3]) for cell in cells)
    return _make_scene("count", f"{COUNTS[number - 2]} {like.colour} {_pluralize(like.shape)}", rng, things)


def _sample_number(rng: np.random.Generator) -> Scene:
    num_digits = rng.integers(2, 4)
    number = str(rng.integers(10 ** (num_digits - 1), 10**num_digits))
    colour = _pick(rng, tuple(COLOURS))
    scene = _make_scene("number", f"The number {number} in {colour}", rng, ())
    return replace(scene, number=number, number_colour=colour)


def _make_scene(kind: Kind, what: str, rng: np.random.Generator, things: tuple[Thing, ...]) -> Scene:
    background = _pick(rng, tuple(BACKGROUNDS))
    return Scene(kind, f"{what} on a {background} background.", background, 0, 0, things)


def _sample_thing(rng: np.random.Generator, x: float, y: float, size: str | None = None) -> Thing:
    size = size or _pick(rng, tuple(SIZES))
    scale = float(rng.uniform(*SIZES[size]))
    thing = Thing(_pick(rng, SHAPES), size, _pick(rng, tuple(COLOURS)), 0, 0, scale)
    return _jitter(thing, rng, x, y)


def _jitter(thing: Thing, rng: np.random.Generator, x: float, y: float) -> Thing:
    dx, dy = (float(d) for d in rng.uniform(-_JITTER, _JITTER, size=2))
    return replace(thing, x=x + dx, y=y + dy)


def _describe(thing: Thing) -> str:
    return f"A {thing.size} {thing.colour} {thing.shape}"


def _pluralize(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _vary(colour: Colour, rng: np.random.Generator) -> Colour:
    red, green, blue = (int(c) for c in np.clip(np.add(colour, rng.integers(-9, 10, size=3)), 0, 255))
    return red, green, blue


def _add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add noise of up to +-6 of 255 to half of the images, as a camera would."""
    if rng.random() >= 0.5:
        return image
    amplitude = int(rng.integers(1, 7))
    pixels = np.asarray(image, dtype=np.int16)
    noise = rng.integers(-amplitude, amplitude + 1, size=pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _trace_outline(thing: Thing, width: int, height: int) -> list[tuple[float, float]]:
    """Return the corners of the object's polygon in pixels."""
    radius = thing.scale * min(width, height) / 2
    return [(thing.x * width + x * radius, thing.y * height + y * radius) for x, y in _UNIT_OUTLINES[thing.shape]]


def _trace_ring(num_corners: int, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    """Return corners around the centre, clockwise from the top; they use the radii in turn."""
    angles = [2 * math.pi * i / num_corners for i in range(num_corners)]
    lengths = [radii[i % len(radii)] for i in range(num_corners)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(lengths, angles, strict=True)]


def _trace_hollow_circle(width: float) -> list[tuple[float, float]]:
    """Return a ring as one polygon: around the outside, then back around the inside."""
    return [*_trace_ring(48), (0.0, -1.0), (0.0, width - 1), *reversed(_trace_ring(48, (1 - width,)))]


def _trace_heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    tops = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -(y + 2.5) / 14.5) for a, y in zip(angles, tops, strict=True)]


_ARM = 0.3  # half the width of a cross's arm
_UNIT_OUTLINES = {
    "circle": _trace_hollow_circle(0.4),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": _trace_ring(10, (1.05, 0.3)),
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
    "heart": _trace_heart(),
}


def _draw_number(pen: ImageDraw.ImageDraw, scene: Scene, colour: Colour, width: int, height: int) -> None:
    size_px = min(0.6 * height, 1.35 * width / len(scene.number))
    font = ImageFont.load_default(size_px)
    pen.text((width / 2, height / 2), scene.number, fill=colour, font=font, anchor="mm")
