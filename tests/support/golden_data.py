"""Expected results of the original Ovis2 code for two tiny checkpoints, and the pictures that it received.

Made once with AIDC-AI/Ovis v2.0 in float32 on a CPU; `golden/<checkpoint>/{aidc,native}` holds the two layouts.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovis_model.config import Layout

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = ("tiny56-tied", "tiny112-untied")
LAYOUTS: tuple[Layout, ...] = ("aidc", "native")
CHANNELS = {"RGB": 3, "L": 1, "RGBA": 4}

Json = dict[str, Any]


def checkpoint_dir(checkpoint: str, layout: Layout = "aidc") -> Path:
    return GOLDEN / checkpoint / layout


@cache
def load_expected(checkpoint: str) -> Json:
    """Return the expected results: 72 cases in `preprocessing`, 8 in `generation`."""
    data: Json = json.loads((GOLDEN / checkpoint / "expected.json").read_text("utf-8"))
    return data


@cache
def load_expected_arrays(checkpoint: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / checkpoint / "expected.npz") as arrays:
        return dict(arrays)


def draw_picture(case: Json) -> Image.Image:
    """Draw the picture of a case from its {seed, width, height, mode}."""
    shape = (case["height"], case["width"], CHANNELS[case["mode"]])
    pixels = np.random.Generator(np.random.PCG64(case["seed"])).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if case["mode"] == "L" else pixels)
