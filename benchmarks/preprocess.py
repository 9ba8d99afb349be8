"""Compare the CPU time from JPEG bytes to tiles of three paths: `python -m benchmarks.preprocess`.

All start with the same decoder and end with bitwise equal pixels. They are the original's (transformers' CLIP processor
for each crop: resize, rescale, normalize, all in float32; then zero padding), Pillow's resize, and the compiled one.
The last two alternate in one process and thread; medians are reported.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.pillow_equality import tile_with_pillow
from ovis_model.inputs.resample import load_resampler
from ovis_model.inputs.tiling import choose_grid, fit_in_tile, tile_image
from ovis_model.network.ovis import build_normalization_table
from pipelines.media.images import decode_image

SIDE_PX, MAX_TILES, ROUNDS = 448, 9, 15
SIZES = ((640, 480), (1280, 720), (1920, 1080), (4000, 3000))


def draw_photo(width: int, height: int) -> Image.Image:
    """Draw soft shapes under film grain."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    shapes = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 8, shapes.shape)
    return Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8))


def encode_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def tile_like_original(image: Image.Image, processor: CLIPImageProcessorPil) -> torch.Tensor:
    """Return float32[N, 3, S, S], normalised and padded the way the original does it."""
    return torch.cat([_normalize_and_pad(crop, processor) for crop in _crop_tiles(image)])


def _crop_tiles(image: Image.Image) -> list[Image.Image]:
    rows, cols = choose_grid(*image.size, MAX_TILES, SIDE_PX)
    xs = [*(i * (image.width // cols) for i in range(cols)), image.width]
    ys = [*(i * (image.height // rows) for i in range(rows)), image.height]
    crops = [image.crop((xs[c], ys[r], xs[c + 1], ys[r + 1])) for r in range(rows) for c in range(cols)]
    return crops if len(crops) == 1 else [image, *crops]


def _normalize_and_pad(crop: Image.Image, processor: CLIPImageProcessorPil) -> torch.Tensor:
    width, height = fit_in_tile(*crop.size, SIDE_PX)
    pixels = processor.preprocess(crop, size={"height": height, "width": width}, return_tensors="pt")
    square = torch.zeros(1, 3, SIDE_PX, SIDE_PX)
    top, left = (SIDE_PX - height) // 2, (SIDE_PX - width) // 2
    square[:, :, top : top + height, left : left + width] = pixels["pixel_values"]
    return square


def tile_and_normalize(image: Image.Image) -> NDArray[np.float32]:
    """Return the tiles as the device normalizes them; for the equality check, not part of the timing."""
    tiles, sizes = tile_image(image, MAX_TILES, SIDE_PX)
    out = np.zeros(tiles.shape, np.float32)
    for tile, square, (height, width) in zip(tiles, out, sizes, strict=True):
        top, left = (SIDE_PX - height) // 2, (SIDE_PX - width) // 2
        inside = np.s_[:, top : top + height, left : left + width]
        square[inside] = build_normalization_table()[np.arange(3)[:, None, None], tile[inside]]
    return out


def measure_cpu_ms(step: Callable[[], object]) -> float:
    start_s = time.process_time()
    step()
    return (time.process_time() - start_s) * 1e3


def measure_median_ms(*steps: Callable[[], object]) -> list[float]:
    """Return the median CPU ms of each step; they alternate so that other load on the machine slows all of them."""
    rounds = [[measure_cpu_ms(step) for step in steps] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def measure_image_size(width: int, height: int, processor: CLIPImageProcessorPil) -> str:
    jpeg = encode_jpeg(draw_photo(width, height))
    image = decode_image(jpeg)
    tiles, _ = tile_image(image, MAX_TILES, SIDE_PX)
    assert (tile_like_original(image, processor).numpy() == tile_and_normalize(image)).all(), "not bitwise equal"
    assert (tile_with_pillow(image, MAX_TILES) == tiles).all(), "not bitwise equal"
    decode, pillow, compiled = measure_median_ms(
        lambda: decode_image(jpeg),
        lambda: tile_with_pillow(decode_image(jpeg), MAX_TILES),
        lambda: tile_image(decode_image(jpeg), MAX_TILES, SIDE_PX),
    )
    # Separately: torch's allocations would give the others page faults that preprocessors, without torch, do not have.
    [original] = measure_median_ms(lambda: tile_like_original(decode_image(jpeg), processor))
    times = f"{decode:9.1f} {original:11.1f} {pillow:9.1f} {compiled:11.1f} {compiled / pillow:18.2f}"
    return f"{f'{width} x {height}':12} {len(tiles):5} {times} {tiles.nbytes:14,}"


def main() -> None:
    torch.set_num_threads(1)
    processor = CLIPImageProcessorPil(do_center_crop=False)
    if load_resampler() is None:
        print("the last column of times is Pillow's too")
    print(f"CPU ms from JPEG to tiles, median of {ROUNDS}, max_tiles={MAX_TILES}, Pillow {PIL.__version__}")
    print("size         tiles    decode    original    Pillow    compiled    compiled/Pillow    bytes a row")
    for width, height in SIZES:
        print(measure_image_size(width, height, processor))


if __name__ == "__main__":
    main()
