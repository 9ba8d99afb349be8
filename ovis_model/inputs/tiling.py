"""Cut an image into the uint8 tiles that Ovis2 sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovis_model.types import Grid

TILE_SIZE_PX = 448
_GOOD_COVERAGE = 0.9  # a grid that keeps more than this share of the pixels needs no more tiles

Box = tuple[int, int, int, int]  # left, top, right, bottom in px; right and bottom are outside


@lru_cache(maxsize=65536)
def choose_grid(width: int, height: int, max_tiles: int, tile_size: int = TILE_SIZE_PX) -> Grid:
    """How to cut a `width` x `height` px picture into at most `max_tiles` cells, without the overview.

    The fewest cells that keep more than 90 % of the pixels once shrunk into a tile; if no grid does, the one
    that keeps the most. Source: AIDC-AI/Ovis v2.0, `get_best_grid`. Raises ValueError if a number is below 1.
    """
    if min(width, height, max_tiles, tile_size) < 1:
        raise ValueError(
            f"cannot cut {width} x {height} px into max_tiles={max_tiles} of tile_size={tile_size} px; "
            "all four must be at least 1"
        )
    coverage = {grid: _compute_coverage(width, height, grid, tile_size) for grid in _list_grids(max_tiles)}
    good = [grid for grid in coverage if coverage[grid] > _GOOD_COVERAGE]
    if good:
        return min(good, key=lambda grid: (grid.rows * grid.cols, -coverage[grid]))
    return min(coverage, key=lambda grid: (-coverage[grid], grid.rows * grid.cols))


def count_tiles(grid: Grid) -> int:
    """Tiles of an image cut by `grid`: its cells, with the overview before them if there are several."""
    cells = grid.rows * grid.cols
    return cells if cells == 1 else cells + 1


def tile_image(
    image: Image.Image, max_tiles: int, tile_size: int = TILE_SIZE_PX
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Tiles of one RGB image: the overview, then the cells in row-major order.

    Returns tiles uint8[N, 3, S, S], the picture centred in each and zeros around it, and sizes int32[N, 2],
    (height_px, width_px) of the picture in each. Raises ValueError for another mode or an empty image.
    """
    return tile_images([image], max_tiles, tile_size)


def tile_images(
    images: Sequence[Image.Image], max_tiles: int, tile_size: int = TILE_SIZE_PX
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """`tile_image` of each of several images, one after the other in the same two arrays."""
    grids = [choose_grid(*_get_size(image), max_tiles, tile_size) for image in images]
    count = sum(count_tiles(grid) for grid in grids)
    tiles = np.zeros((count, 3, tile_size, tile_size), np.uint8)
    sizes = np.empty((count, 2), np.int32)
    pictures = (p for image, grid in zip(images, grids, strict=True) for p in _make_crops(image, grid, tile_size))
    for i, picture in enumerate(pictures):
        sizes[i] = picture.height, picture.width
        _paste(picture, tiles[i])
    return tiles, sizes


def fit_in_tile(width: int, height: int, tile_size: int = TILE_SIZE_PX) -> tuple[int, int]:
    """(width_px, height_px) of a crop inside its tile: the longer side fills it.

    At least 1 px: beyond `tile_size`:1 the original rounds the shorter side to 0 and crashes.
    """
    # int(a / b * size) truncates where size * a // b does not (672 x 183); written as in the original.
    if width == height:
        return tile_size, tile_size
    if width > height:
        return tile_size, max(1, int(height / width * tile_size))
    return max(1, int(width / height * tile_size)), tile_size


def _get_size(image: Image.Image) -> tuple[int, int]:
    if image.mode != "RGB":
        raise ValueError(f"cannot tile a picture in mode {image.mode!r}; pass image.convert('RGB')")
    return image.size


def _list_grids(max_tiles: int) -> list[Grid]:
    sides = range(1, max_tiles + 1)
    return [Grid(rows, cols) for rows in sides for cols in sides if rows * cols <= max_tiles]


def _compute_coverage(width: int, height: int, grid: Grid, tile_size: int) -> float:
    # Not sum(): from Python 3.12 on it compensates rounding, and the last bit decides ties.
    total: float = 0
    for left, top, right, bottom in _cut_cells(width, height, grid):
        total += _compute_kept_area(right - left, bottom - top, tile_size)
    return total / (width * height)


def _compute_kept_area(width: int, height: int, tile_size: int) -> float:
    """Area of a cell once its longer side is shrunk to `tile_size`; small cells are not enlarged."""
    long, short = max(width, height), min(width, height)
    return short / long * tile_size * tile_size if long > tile_size else long * short


def _cut_cells(width: int, height: int, grid: Grid) -> Iterator[Box]:
    """Equal cells in row-major order; the last row and column take the remainder.

    A cell can be empty if a side is shorter than the grid, but such a grid is never chosen: it keeps just as
    much with fewer cells.
    """
    for top, bottom in _split_evenly(height, grid.rows):
        for left, right in _split_evenly(width, grid.cols):
            yield left, top, right, bottom


def _split_evenly(length: int, parts: int) -> list[tuple[int, int]]:
    step = length // parts
    return [(i * step, length if i == parts - 1 else (i + 1) * step) for i in range(parts)]


def _make_crops(image: Image.Image, grid: Grid, tile_size: int) -> Iterator[Image.Image]:
    if grid != (1, 1):
        yield _shrink(image, tile_size)
    for box in _cut_cells(image.width, image.height, grid):
        # Not resize(box=...): its filter would reach across the cell's edge.
        yield _shrink(image.crop(box), tile_size)


def _shrink(crop: Image.Image, tile_size: int) -> Image.Image:
    width, height = fit_in_tile(crop.width, crop.height, tile_size)
    # Width, then height: one call did so until Pillow 13, which takes tall pictures the other way round
    # (python-pillow/Pillow#9549) and rounds up to a third of their bytes differently.
    narrowed = crop.resize((width, crop.height), Image.Resampling.BICUBIC)
    return narrowed.resize((width, height), Image.Resampling.BICUBIC)


def _paste(picture: Image.Image, tile: NDArray[np.uint8]) -> None:
    width, height = picture.size
    top, left = (tile.shape[1] - height) // 2, (tile.shape[2] - width) // 2
    # One packed copy per channel: a fifth of the time of transposing the interleaved array.
    for channel, plane in zip("RGB", tile, strict=True):
        band = np.frombuffer(picture.tobytes("raw", channel), np.uint8)
        plane[top : top + height, left : left + width] = band.reshape(height, width)
