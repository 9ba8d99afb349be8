"""Cut an image into uint8 tiles, the input of Ovis2's vision tower.

A crop is a box of the image, shrunk to fit into a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovis_model.inputs.resample import Crop, resize_crops
from ovis_model.types import Grid

TILE_SIZE_PX = 448
_GOOD_COVERAGE = 0.9  # a grid that keeps more than this share of the pixels needs no more tiles

Box = tuple[int, int, int, int]  # left, top, right, bottom in px; right and bottom are exclusive


@lru_cache(maxsize=65536)
def choose_grid(width: int, height: int, max_tiles: int, tile_size: int = TILE_SIZE_PX) -> Grid:
    """Choose how to cut an image of `width` x `height` px into at most `max_tiles` tiles, without the overview.

    Choose the grid with the fewest tiles whose shrunk crops keep more than 90 % of the pixels. If there is none, choose
    the grid that keeps the most pixels. Source: AIDC-AI/Ovis v2.0, `get_best_grid`. Raise ValueError if a number is
    below 1.
    """
    if min(width, height, max_tiles, tile_size) < 1:
        raise ValueError(
            f"cannot cut {width} x {height} px into max_tiles={max_tiles} of tile_size={tile_size} px; "
            "each of these numbers must be at least 1"
        )
    coverage = {grid: _compute_coverage(width, height, grid, tile_size) for grid in _list_grids(max_tiles)}
    good = [grid for grid in coverage if coverage[grid] > _GOOD_COVERAGE]
    if good:
        return min(good, key=lambda grid: (grid.rows * grid.cols, -coverage[grid]))
    return min(coverage, key=lambda grid: (-coverage[grid], grid.rows * grid.cols))


def count_tiles(grid: Grid) -> int:
    """Return the number of tiles of an image cut by `grid`; if there are several, the overview is one more."""
    count = grid.rows * grid.cols
    return count if count == 1 else count + 1


@lru_cache(maxsize=65536)
def choose_reduction(width: int, height: int, max_tiles: int, tile_size: int = TILE_SIZE_PX) -> int:
    """Return the largest of 8, 4, 2 and 1 by which an image may be reduced before it is tiled.

    The reduced image has the same grid, and no crop of it has fewer pixels than its tile.
    """
    grid = choose_grid(width, height, max_tiles, tile_size)
    needed_px = min(tile_size, max(width // grid.cols, height // grid.rows))
    for factor in (8, 4, 2):
        reduced = math.ceil(width / factor), math.ceil(height / factor)
        longer_px = max(reduced[0] // grid.cols, reduced[1] // grid.rows)
        if longer_px >= needed_px and choose_grid(*reduced, max_tiles, tile_size) == grid:
            return factor
    return 1


def tile_image(
    image: Image.Image, max_tiles: int, tile_size: int = TILE_SIZE_PX
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Cut one RGB image into its tiles: the overview, then the others in row-major order.

    Return tiles uint8[N, 3, S, S], each with its crop in the centre and zeros around it, and sizes int32[N, 2], the
    (height_px, width_px) of each crop. Raise ValueError if the image is empty or has another mode.
    """
    return tile_images([image], max_tiles, tile_size)


def tile_images(
    images: Sequence[Image.Image], max_tiles: int, tile_size: int = TILE_SIZE_PX
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Cut several images like `tile_image`; their tiles follow each other in the same two arrays."""
    cuts = [list_crops(image, max_tiles, tile_size) for image in images]
    crops = [crop for cut in cuts for crop in cut]
    tiles = np.zeros((len(crops), 3, tile_size, tile_size), np.uint8)
    sizes = np.array([(crop.height, crop.width) for crop in crops], np.int32).reshape(-1, 2)
    start = 0
    for image, cut in zip(images, cuts, strict=True):
        resize_crops(image, cut, tiles[start : start + len(cut)])
        start += len(cut)
    return tiles, sizes


def list_crops(image: Image.Image, max_tiles: int, tile_size: int) -> list[Crop]:
    """Return the crops of an RGB image: the overview, if there are several tiles, then the others in row-major order.

    Raise ValueError if the image is empty or has another mode.
    """
    width, height = _get_size(image)
    grid = choose_grid(width, height, max_tiles, tile_size)
    boxes = list(_cut_boxes(width, height, grid))
    if grid != (1, 1):
        boxes = [(0, 0, width, height), *boxes]
    return [Crop(*box, *fit_in_tile(box[2] - box[0], box[3] - box[1], tile_size)) for box in boxes]


def fit_in_tile(width: int, height: int, tile_size: int = TILE_SIZE_PX) -> tuple[int, int]:
    """Fit a crop into its tile; return (width_px, height_px), whose longer side is `tile_size`.

    The shorter side is at least 1 px. The original rounds it to 0 beyond an aspect of `tile_size`:1, and crashes.
    """
    # As in the original: int(a / b * size) truncates where size * a // b does not (672 x 183).
    if width == height:
        return tile_size, tile_size
    if width > height:
        return tile_size, max(1, int(height / width * tile_size))
    return max(1, int(width / height * tile_size)), tile_size


def _get_size(image: Image.Image) -> tuple[int, int]:
    if image.mode != "RGB":
        raise ValueError(f"cannot cut an image in mode {image.mode!r} into tiles; pass image.convert('RGB')")
    return image.size


def _list_grids(max_tiles: int) -> list[Grid]:
    sides = range(1, max_tiles + 1)
    return [Grid(rows, cols) for rows in sides for cols in sides if rows * cols <= max_tiles]


def _compute_coverage(width: int, height: int, grid: Grid, tile_size: int) -> float:
    # Not sum(): since Python 3.12 it compensates rounding errors, and the last bit decides ties.
    total: float = 0
    for left, top, right, bottom in _cut_boxes(width, height, grid):
        total += _compute_kept_area(right - left, bottom - top, tile_size)
    return total / (width * height)


def _compute_kept_area(width: int, height: int, tile_size: int) -> float:
    """Return the area in px of a crop whose longer side is shrunk to `tile_size`; small crops count unenlarged."""
    long, short = max(width, height), min(width, height)
    return short / long * tile_size * tile_size if long > tile_size else long * short


def _cut_boxes(width: int, height: int, grid: Grid) -> Iterator[Box]:
    """Yield equal boxes in row-major order; the last row and column take the remainder.

    A box is empty if a side has fewer pixels than the grid has parts. Such a grid is never chosen, because one with
    fewer tiles keeps as many pixels.
    """
    for top, bottom in _split_evenly(height, grid.rows):
        for left, right in _split_evenly(width, grid.cols):
            yield left, top, right, bottom


def _split_evenly(length: int, parts: int) -> list[tuple[int, int]]:
    step = length // parts
    return [(i * step, length if i == parts - 1 else (i + 1) * step) for i in range(parts)]
