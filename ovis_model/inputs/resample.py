"""Resize crops of an image into tiles, bit for bit as Pillow does, with compiled code where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

_ROWS_PER_STRIP = 64  # a multiple of 32; 4 MB of a 16,000 px wide image, which fit into a core's cache

logger = logging.getLogger(__name__)


class Crop(NamedTuple):
    """A box of an image in px, whose right and bottom are exclusive, and the size to which it is resized."""

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int


def resize_crops(image: Image.Image, crops: Sequence[Crop], tiles: NDArray[np.uint8]) -> None:
    """Resize each crop of an RGB image, without pixels outside its box, into the centre of its tile.

    tiles: uint8[len(crops), 3, S, S]. What a crop leaves of its tile is not written.
    """
    resampler = load_resampler()
    if resampler and max(image.size) <= resampler.MAX_SIDE_PX:
        resampler.resize_crops(_read_strips(image), *image.size, list(crops), tiles, tiles.shape[-1])
    else:
        resize_crops_with_pillow(image, crops, tiles)


def resize_crops_with_pillow(image: Image.Image, crops: Sequence[Crop], tiles: NDArray[np.uint8]) -> None:
    """Resize like `resize_crops`, which must equal this in every bit."""
    for crop, tile in zip(crops, tiles, strict=True):
        # Not resize(box=...): its filter would read pixels outside the box.
        _paste(_resize_with_pillow(image.crop(crop[:4]), crop.width, crop.height), tile)


@cache
def load_resampler() -> ModuleType | None:
    """Return the compiled resampler if it is installed and equals this Pillow; otherwise log the reason.

    The first call of a process compares, in 2 ms.
    """
    try:
        resampler = import_module("_ovis_resample")
        if _equals_pillow(resampler):
            return resampler
        reason = f"differs from Pillow {PIL.__version__}; install the Pillow of constraints.txt"
    except ModuleNotFoundError:
        reason = "was not built; install a C compiler, then install this package again"
    except ImportError as error:
        reason = f"cannot be loaded: {error}"
    except TypeError:
        reason = "is of another version of this package; install the package again"
    logger.warning("Pillow resizes the images, in three times the time: the compiled resampler %s", reason)
    return None


def _equals_pillow(resampler: ModuleType) -> bool:
    """Compare on noise: shrunk, enlarged, equal in one side, 1 px thin, and beyond black and white."""
    rng = np.random.default_rng(0)
    for width, height, side in ((150, 95, 56), (56, 201, 56), (1, 90, 56), (333, 2, 112), (40, 33, 112)):
        image = Image.fromarray(rng.choice(np.array([0, 1, 99, 254, 255], np.uint8), (height, width, 3)))
        crops = [Crop(0, 0, width, height, side, side), Crop(0, height // 2, (width + 1) // 2, height, side, 50)]
        expected, tiles = np.zeros((2, len(crops), 3, side, side), np.uint8)
        resize_crops_with_pillow(image, crops, expected)
        resampler.resize_crops(_read_strips(image), width, height, crops, tiles, side)
        if not np.array_equal(tiles, expected):
            return False
    return True


def _read_strips(image: Image.Image) -> Iterator[object]:
    """Yield the pixels of some rows at a time, 4 bytes each: all of them where Pillow has them in one piece."""
    try:
        yield _view_pixels(image)
    except ValueError:  # beyond 16 MB, Pillow's memory is in several pieces
        for top in range(0, image.height, _ROWS_PER_STRIP):
            yield _view_pixels(image.crop((0, top, image.width, min(top + _ROWS_PER_STRIP, image.height))))


def _view_pixels(image: Image.Image) -> object:
    """Return an Arrow array in a capsule, for which nothing is copied. Raise ValueError if memory is in pieces."""
    return image.__arrow_c_array__()[1]


def _resize_with_pillow(crop: Image.Image, width: int, height: int) -> Image.Image:
    # Width, then height, in two calls: Pillow 13 reverses the order for tall images (python-pillow/Pillow#9549), which
    # changes the rounding of up to a third of their bytes.
    narrowed = crop.resize((width, crop.height), Image.Resampling.BICUBIC)
    return narrowed.resize((width, height), Image.Resampling.BICUBIC)


def _paste(picture: Image.Image, tile: NDArray[np.uint8]) -> None:
    width, height = picture.size
    top, left = (tile.shape[1] - height) // 2, (tile.shape[2] - width) // 2
    # One packed copy per channel takes a fifth of the time of transposing the interleaved array.
    for channel, plane in zip("RGB", tile, strict=True):
        band = np.frombuffer(picture.tobytes("raw", channel), np.uint8)
        plane[top : top + height, left : left + width] = band.reshape(height, width)
