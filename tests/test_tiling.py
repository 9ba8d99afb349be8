"""Tiles equal those of the original code bit by bit, for pictures of every size."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ovis_model.inputs.prompt import make_placeholders
from ovis_model.inputs.tiling import choose_grid, count_tiles, fit_in_tile, tile_image, tile_images
from ovis_model.network.ovis import CLIP_MEAN, CLIP_STD, build_normalization_table
from ovis_model.types import Grid
from tests.support.golden_data import CHECKPOINTS, draw_picture, load_expected

MAX_TILES = range(1, 13)
sides = st.integers(1, 4000) | st.sampled_from([447, 448, 449, 896, 897, 1344, 1345, 4032])


def draw_noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def locate_picture(tile_size: int, size: NDArray[np.int32]) -> tuple[slice, slice]:
    """Return the rows and columns of a tile that its picture covers."""
    height, width = (int(side) for side in size)
    top, left = (tile_size - height) // 2, (tile_size - width) // 2
    return slice(top, top + height), slice(left, left + width)


def normalize(tiles: NDArray[np.uint8], sizes: NDArray[np.int32]) -> NDArray[np.float32]:
    """Normalize tiles as the device does: by the table inside the picture, zero around it."""
    values = build_normalization_table()[np.arange(3)[:, None, None], tiles]
    out = np.zeros_like(values)
    for i, size in enumerate(sizes):
        rows, cols = locate_picture(tiles.shape[-1], size)
        out[i, :, rows, cols] = values[i, :, rows, cols]
    return out


def choose_reference_grid(width: int, height: int, max_tiles: int, side: int = 448) -> tuple[int, int]:
    """Choose a grid by the original rule, written out cell by cell."""
    ranked = []
    for rows in range(1, max_tiles + 1):
        for cols in range(1, max_tiles // rows + 1):
            kept = 0.0
            for r in range(rows):
                for c in range(cols):
                    w = width // cols if c < cols - 1 else width - (cols - 1) * (width // cols)
                    h = height // rows if r < rows - 1 else height - (rows - 1) * (height // rows)
                    longer, shorter = float(max(w, h)), float(min(w, h))
                    if longer > side:
                        shorter, longer = shorter / longer * side, side
                    kept += longer * shorter
            ranked.append((kept / (width * height), (rows, cols)))
    good = [entry for entry in ranked if entry[0] > 0.9]
    if good:
        fewest = min(rows * cols for _, (rows, cols) in good)
        ranked = [entry for entry in good if entry[1][0] * entry[1][1] == fewest]
    best = max(ratio for ratio, _ in ranked)
    ranked = [entry for entry in ranked if entry[0] == best]
    fewest = min(rows * cols for _, (rows, cols) in ranked)
    return next(grid for _, grid in ranked if grid[0] * grid[1] == fewest)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_tiles_equal_the_originals_in_all_golden_cases(checkpoint: str) -> None:
    data = load_expected(checkpoint)
    assert len(data["preprocessing"]) == 72
    for case in data["preprocessing"]:
        image = draw_picture(case).convert("RGB")
        grid = choose_grid(*image.size, case["max_partition"], data["image_size"])
        tiles, sizes = tile_image(image, case["max_partition"], data["image_size"])
        assert list(grid) == case["grid"], case
        assert len(tiles) == len(sizes) == count_tiles(grid) == case["num_crops"], case
        assert make_placeholders(grid) == case["placeholders"], case
        assert hashlib.sha256(normalize(tiles, sizes).tobytes()).hexdigest() == case["sha256_float32"], case


@pytest.mark.parametrize("max_tiles", MAX_TILES)
def test_grid_equals_the_original_rule(max_tiles: int) -> None:
    rng = np.random.default_rng(max_tiles)
    sizes = np.exp(rng.uniform(0, np.log(8000), (260, 2))).astype(int) + 1
    on_edges = 448 * rng.integers(1, 8, (40, 2)) + rng.integers(-1, 2, (40, 2))
    for width, height in np.concatenate([sizes, on_edges]).tolist():
        assert choose_grid(width, height, max_tiles) == choose_reference_grid(width, height, max_tiles), (
            width,
            height,
        )


@given(sides, sides, st.sampled_from(MAX_TILES), st.sampled_from([56, 112, 448]))
@settings(max_examples=150, deadline=None)
def test_grid_equals_the_original_rule_for_any_tile_size(w: int, h: int, max_tiles: int, tile_size: int) -> None:
    assert choose_grid(w, h, max_tiles, tile_size) == choose_reference_grid(w, h, max_tiles, tile_size)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 480), (2, 2)),
        ((1024, 768), (2, 3)),
        ((1280, 720), (2, 3)),
        ((1920, 1080), (2, 4)),
        ((1024, 1024), (3, 3)),
        ((4032, 3024), (3, 3)),
        ((1000, 300), (1, 3)),
    ],
)
def test_common_sizes_have_these_grids(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert choose_grid(*size, 9) == Grid(*grid)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(MAX_TILES))
@settings(max_examples=100, deadline=None)
def test_every_tile_holds_a_centred_picture_in_a_zero_border(width: int, height: int, max_tiles: int) -> None:
    tile_size = 28
    tiles, sizes = tile_image(Image.new("RGB", (width, height), (255, 254, 253)), max_tiles, tile_size)
    assert tiles.dtype == np.uint8
    assert sizes.dtype == np.int32
    assert tiles.shape == (
        count_tiles(choose_grid(width, height, max_tiles, tile_size)),
        3,
        tile_size,
        tile_size,
    )
    assert sizes.shape == (len(tiles), 2)
    assert (sizes.max(axis=1) == tile_size).all()
    for tile, size in zip(tiles, sizes, strict=True):
        expected_tile = np.zeros_like(tile)
        rows, cols = locate_picture(tile_size, size)
        expected_tile[:, rows, cols] = np.array([255, 254, 253], np.uint8)[:, None, None]
        assert (tile == expected_tile).all()


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(MAX_TILES), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_tiles_are_the_resized_crops(width: int, height: int, max_tiles: int, seed: int) -> None:
    tile_size = 56
    image = draw_noise(width, height, seed)
    rows, cols = choose_grid(width, height, max_tiles, tile_size)
    xs, ys = ([i * (n // k) for i in range(k)] + [n] for n, k in ((width, cols), (height, rows)))
    boxes = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(cols)]
    crops = [image.crop(box) for box in ([(0, 0, width, height), *boxes] if len(boxes) > 1 else boxes)]
    tiles, sizes = tile_image(image, max_tiles, tile_size)
    assert len(tiles) == len(crops)
    for tile, size, crop in zip(tiles, sizes, crops, strict=True):
        w, h = fit_in_tile(*crop.size, tile_size)
        resized = crop.resize((w, crop.height), Image.Resampling.BICUBIC).resize((w, h), Image.Resampling.BICUBIC)
        assert (h, w) == tuple(size)
        inside_rows, inside_cols = locate_picture(tile_size, size)
        assert (tile[:, inside_rows, inside_cols] == np.asarray(resized).transpose(2, 0, 1)).all()


def test_a_tile_contains_nothing_of_its_neighbours() -> None:
    image = Image.new("RGB", (896, 448))
    image.paste((255, 255, 255), (448, 0, 896, 448))
    tiles, _ = tile_image(image.resize((1000, 500), Image.Resampling.NEAREST), 2)
    assert (tiles[1] == 0).all()
    assert (tiles[2] == 255).all()


@pytest.mark.parametrize("ratio", [2, 10, 100, 447, 448, 449, 1000, 10_000])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("short", [1, 3])
def test_extreme_shapes_are_tiled(ratio: int, tall: bool, short: int) -> None:
    size = (short, short * ratio) if tall else (short * ratio, short)
    tiles, sizes = tile_image(draw_noise(*size), 9)
    assert len(tiles) == len(sizes) <= 10
    assert sizes.min() >= 1
    assert sizes.max() == 448


def test_the_tiles_of_several_images_are_concatenated() -> None:
    images = [draw_noise(90, 40), draw_noise(20, 30, 1), draw_noise(57, 200, 2)]
    tiles, sizes = tile_images(images, 4, 56)
    alone = [tile_image(image, 4, 56) for image in images]
    assert (tiles == np.concatenate([tiles for tiles, _ in alone])).all()
    assert (sizes == np.concatenate([sizes for _, sizes in alone])).all()


def test_no_images_give_no_tiles() -> None:
    tiles, sizes = tile_images([], 9, 56)
    assert tiles.shape == (0, 3, 56, 56)
    assert sizes.shape == (0, 2)


@pytest.mark.parametrize("numbers", [(0, 5, 9, 448), (5, 0, 9, 448), (5, 5, 0, 448), (5, 5, 9, 0)])
def test_zero_sizes_and_limits_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{numbers[0]} x {numbers[1]} px into max_tiles={numbers[2]}"):
        choose_grid(*numbers)


def test_empty_pictures_and_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5 px"):
        tile_image(Image.new("RGB", (0, 5)), 9)
    with pytest.raises(ValueError, match=r"'RGBA'.*convert"):
        tile_image(Image.new("RGBA", (5, 5)), 9)


def test_a_full_hd_row_takes_at_most_5_5_mb() -> None:
    tiles, sizes = tile_image(Image.new("RGB", (1920, 1080)), 9)
    assert tiles.nbytes + sizes.nbytes <= 5.5e6


def test_normalization_uses_clips_mean_and_std() -> None:
    table = build_normalization_table()
    assert table.shape == (3, 256)
    assert table.dtype == np.float32
    exact = (np.arange(256) / 255 - np.array(CLIP_MEAN)[:, None]) / np.array(CLIP_STD)[:, None]
    np.testing.assert_allclose(table, exact, atol=1e-6)
    assert (table != 0).all()  # so no pixel can have the colour of the zero border
