"""With --fast-decode, JPEG images are decoded at a fraction of their size where their tiles need no more."""

from __future__ import annotations

import io
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from ovis_model.inputs.tiling import choose_grid, choose_reduction, tile_image
from pipelines.errors import RunError
from pipelines.media.images import read_image
from pipelines.output.run_record import open_run
from tests.support.job_configs import MODEL, make_job_config
from tests.support.stages import prepare_rows

TILE_PX = 56
choose = partial(choose_reduction, max_tiles=9, tile_size=TILE_PX)


def encode(width: int, height: int, form: str = "JPEG", orientation: int = 1) -> bytes:
    """Encode waves in three colours."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([128 + 100 * np.sin(x / 40), 128 + 100 * np.cos(y / 30), (x + y) % 256], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, quality=92, exif=exif)
    return file.getvalue()


def test_a_reduced_image_has_the_same_grid_and_pixels_for_each_tile() -> None:
    drawn, factors = random.Random(0), set()
    for _ in range(2000):
        width, height, max_tiles = drawn.randint(1, 9000), drawn.randint(1, 9000), drawn.randint(1, 12)
        factor = choose_reduction(width, height, max_tiles)
        factors.add(factor)
        if factor > 1:
            reduced = -(-width // factor), -(-height // factor)
            grid = choose_grid(width, height, max_tiles)
            assert choose_grid(*reduced, max_tiles) == grid
            assert max(reduced[0] // grid.cols, reduced[1] // grid.rows) >= 448
    assert factors == {1, 2, 4, 8}


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_reduced(orientation: int) -> None:
    data = encode(900, 600, orientation=orientation)
    exact, fast = read_image(data), read_image(data, choose_reduction=choose)
    assert fast.size == exact.size == exact.pixels.size == ((900, 600), (600, 900))[orientation == 6]
    assert fast.pixels.size == tuple(-(-px // choose(*fast.size)) for px in fast.size) != fast.size
    tiles, fast_tiles = (tile_image(image.pixels, 9, TILE_PX)[0].astype(int) for image in (exact, fast))
    assert tiles.shape == fast_tiles.shape and 0 < np.abs(tiles - fast_tiles).mean() < 3


@pytest.mark.parametrize(("form", "width"), [("PNG", 900), ("WEBP", 900), ("TIFF", 900), ("JPEG", 150)])
def test_other_formats_and_small_images_are_not_reduced(form: str, width: int) -> None:
    data = encode(width, width * 2 // 3, form, orientation=6)
    exact, fast = read_image(data), read_image(data, choose_reduction=choose)
    assert exact.pixels.tobytes() == fast.pixels.tobytes() and exact.size == fast.size == exact.pixels.size


def test_rows_keep_the_full_size_and_the_number_of_tiles(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(encode(900, 600))
    rows = {}
    for is_fast in (False, True):
        output = tmp_path / f"fast {is_fast}"
        [rows[is_fast]] = prepare_rows(make_job_config([pictures], output, fast_decode=is_fast))
    exact, fast = rows[False], rows[True]
    assert exact.media == fast.media and exact.num_tiles == fast.num_tiles
    assert (exact.requests[0].input_ids == fast.requests[0].input_ids).all()
    assert (exact.requests[0].tiles != fast.requests[0].tiles).any()


def test_the_option_is_recorded_and_cannot_change(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(60, 40))
    config = make_job_config([tmp_path / "a.jpg"], tmp_path / "out", fast_decode=True)
    open_run(config, {"id": MODEL, "revision": None})
    assert '"fast_decode": true' in (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(RunError, match=r"fast.decode"):
        open_run(config.model_copy(update={"fast_decode": False}), {"id": MODEL, "revision": None})


def test_a_broken_jpeg_keeps_its_message() -> None:
    data = encode(900, 600)[:5000]
    errors = []
    for options in ({}, {"choose_reduction": choose}):
        with pytest.raises(ValueError) as caught:
            read_image(data, **options)  # type: ignore[arg-type]
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
