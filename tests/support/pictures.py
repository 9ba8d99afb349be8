"""Draw pictures for tests from a seed or in one colour."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from demo.drawings import make_picture
from pipelines.media.reference import FileRef


def encode_picture(seed: int) -> bytes:
    """Return a PNG in one colour; the seed determines its colour and width."""
    buffer = io.BytesIO()
    Image.new("RGB", (60 + 9 * (seed % 8), 50), (seed * 7 % 256, seed * 31 % 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def draw(path: Path, seed: int, width: int = 90, height: int = 60) -> Path:
    """Draw a picture of smooth colours; the suffix determines the format."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def write_demo_pictures(directory: Path, count: int) -> Path:
    """Write `count` of the demo's held-out pictures as 0000.png, 0001.png, ...; return the directory."""
    for seed in range(count):
        make_picture(seed, held_out=True)[0].save(directory / f"{seed:04}.png")
    return directory


def write_image(path: Path, colour: str = "red", size: tuple[int, int] = (64, 48)) -> FileRef:
    Image.new("RGB", size, colour).save(path)
    return FileRef(str(path))
