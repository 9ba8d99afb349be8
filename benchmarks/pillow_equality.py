"""Compare compiled tiling with Pillow's, bit for bit.

    python -m benchmarks.pillow_equality [--sizes 2000] [FOLDER ...]

The images are noise and gradients of random sizes, then every file below the folders that a job can decode. Prints
counts and each image whose tiles differ; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from ovis_model.inputs.resample import load_resampler, resize_crops_with_pillow
from ovis_model.inputs.tiling import TILE_SIZE_PX, list_crops, tile_image
from pipelines.errors import MediaError
from pipelines.media.images import read_image

MAX_SIDES_PX = ((60, 60), (1800, 1800), (30, 1500), (1500, 30), (1, 3000), (3000, 1))
TILE_SIZES_PX = (56, 112, TILE_SIZE_PX)


def tile_with_pillow(image: Image.Image, max_tiles: int, tile_size: int = TILE_SIZE_PX) -> NDArray[np.uint8]:
    crops = list_crops(image, max_tiles, tile_size)
    tiles = np.zeros((len(crops), 3, tile_size, tile_size), np.uint8)
    resize_crops_with_pillow(image, crops, tiles)
    return tiles


def is_equal(image: Image.Image, max_tiles: int = 9, tile_size: int = TILE_SIZE_PX) -> bool:
    tiles = tile_image(image, max_tiles, tile_size)[0]
    return np.array_equal(tiles, tile_with_pillow(image, max_tiles, tile_size))


def draw_random(rng: np.random.Generator) -> Image.Image:
    """Draw noise, black and white noise, or a gradient, often thin, small or of one colour in an axis."""
    width, height = (int(rng.integers(1, side, endpoint=True)) for side in MAX_SIDES_PX[rng.integers(6)])
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    kind = rng.integers(4)
    if kind == 0:
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    elif kind == 1:
        pixels[:] = np.linspace(0, 255, width).astype(np.uint8)[:, None]
    return Image.fromarray(pixels)


def draw_cases(count: int, seed: int) -> Iterator[tuple[Image.Image, int, int]]:
    """Yield images with a maximum number of tiles and a size of tiles in px."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield draw_random(rng), int(rng.integers(1, 12)), int(rng.choice(TILE_SIZES_PX))


def compare_random_images(count: int, seed: int) -> Counter[str]:
    """Count the results, and print each image whose tiles differ."""
    results: Counter[str] = Counter()
    for case in draw_cases(count, seed):
        result = "equal" if is_equal(*case) else "different"
        results[result] += 1
        if result == "different":
            print(f"different: {case[0].size} px, max_tiles={case[1]}, tile_size={case[2]}")
    return results


def compare_files(folder: Path) -> tuple[Counter[str], Counter[str], set[tuple[int, int]]]:
    """Count the results and the formats of the files below `folder`, and collect their sizes in px."""
    results: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    sizes = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            image = read_image(path.read_bytes())
        except MediaError:
            results["not decoded"] += 1
            continue
        result = "equal" if is_equal(image.pixels) else "different"
        results[result] += 1
        formats[image.format] += 1
        sizes.add(image.pixels.size)
        if result == "different":
            print(f"different: {path}, {image.pixels.size} px")
    return results, formats, sizes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--sizes", type=int, default=2000, help="number of random images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if load_resampler() is None:
        return 2
    print(f"Pillow {PIL.__version__}; random images: {dict(compare := compare_random_images(args.sizes, args.seed))}")
    is_different = compare["different"] > 0
    for folder in args.folders:
        results, formats, sizes = compare_files(folder)
        print(f"{folder}: {dict(results)}; {len(sizes)} sizes; formats {dict(formats.most_common())}")
        is_different |= results["different"] > 0
    return int(is_different)


if __name__ == "__main__":
    sys.exit(main())
