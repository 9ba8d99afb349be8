"""Draw pictures of single objects, and scenes with one object each, that a tiny encoder can learn."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 220),
    "yellow": (235, 215, 40),
    "purple": (140, 40, 170),
    "cyan": (40, 200, 210),
}
SHAPES = ("circle", "square", "triangle", "cross")


class Object(NamedTuple):
    colour: str
    shape: str

    @property
    def text(self) -> str:
        return f"a {self.colour} {self.shape}"


OBJECTS = tuple(Object(*pair) for pair in product(COLOURS, SHAPES))


def draw_object(thing: Object, random: np.random.Generator, side_px: int = 64) -> Image.Image:
    """Draw the object at a random place and size on a grey background with noise."""
    grey = random.integers(90, 170)
    noise = random.integers(-12, 13, (side_px, side_px, 1))
    image = Image.fromarray(np.clip(grey + noise, 0, 255).astype(np.uint8).repeat(3, axis=2))
    radius = side_px * random.uniform(0.22, 0.36)
    x, y = random.uniform(radius, side_px - radius, 2)
    _paint(ImageDraw.Draw(image), thing, x, y, radius)
    return image


def _paint(pen: ImageDraw.ImageDraw, thing: Object, x: float, y: float, r: float) -> None:
    fill = COLOURS[thing.colour]
    match thing.shape:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        case "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill)
        case "triangle":
            pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill)
        case "cross":
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)


def draw_scenes(seed: int, num_scenes: int = 8, frames_per_scene: int = 16) -> tuple[list[Object], list[Image.Image]]:
    """Return the object of each scene, all different, and the frames of all scenes in order."""
    random = np.random.default_rng(seed)
    chosen = [OBJECTS[i] for i in random.choice(len(OBJECTS), num_scenes, replace=False)]
    return chosen, [draw_object(thing, random) for thing in chosen for _ in range(frames_per_scene)]
