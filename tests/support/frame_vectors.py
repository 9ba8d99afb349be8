"""Make vectors that resemble those of a frame encoder."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def make_frames(count: int, width: int = 32, seed: int = 0) -> tuple[Array, Array]:
    """Return frames float64[count, width] of scenes that drift and are cut, and a query float64[width] far from all."""
    random = np.random.default_rng(seed)
    common, step = random.normal(size=width), random.normal(size=(count, width))
    cuts = np.maximum.accumulate(np.where(random.random(count) < 0.1, np.arange(count), 0))
    frames = normalize(1.5 * normalize(common) + normalize(random.normal(size=(count, width))[cuts] + 0.3 * step))
    return frames, normalize(0.15 * normalize(common) + normalize(random.normal(size=width)))


def normalize(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
