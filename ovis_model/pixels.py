"""A byte of a picture to the float32 that the vision encoder was trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of red, green and blue in [0, 1]; the `image_mean` of every published checkpoint."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalization_table() -> NDArray[np.float32]:
    """float32[3, 256]: row c maps a byte of channel c to its normalised value.

    Bitwise what the original's `CLIPImageProcessor` computes. The border of a tile is 0 after normalisation,
    which no byte maps to: set it, do not look it up.
    """
    # Order and types decide the last bit: a float64 product rounded once, then float32 throughout.
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(CLIP_MEAN, np.float32)[:, None], np.array(CLIP_STD, np.float32)[:, None]
    table: NDArray[np.float32] = (unit - mean) / std
    return table
