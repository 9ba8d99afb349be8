"""Measure `--fast-decode`: its time, what it changes in tiles, and in the demo model's captions.

    python -m benchmarks.fast_decode [--images 200]

The captions are those of drawn images of the demo, enlarged sixfold and stored as JPEG with quality 90; both sides see
the same files. Prints two tables, then JSON.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import numpy as np
from PIL import Image

from benchmarks.preprocess import draw_photo, encode_jpeg, measure_median_ms
from demo.drawings import make_picture
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.inputs.tiling import TILE_SIZE_PX, choose_reduction, tile_image
from ovis_model.types import SamplingParams
from pipelines.media.images import read_image

SIZES = ((1280, 720), (1920, 1080), (4000, 3000), (8000, 6000))
MAX_TILES, ENLARGED, FIRST_SEED = 9, 6, 30_000_000


def decode(data: bytes, *, is_fast: bool, tile_size: int = TILE_SIZE_PX) -> Image.Image:
    choose = partial(choose_reduction, max_tiles=MAX_TILES, tile_size=tile_size)
    return read_image(data, choose_reduction=choose if is_fast else None).pixels


def measure_size(width: int, height: int) -> dict[str, float]:
    data = encode_jpeg(draw_photo(width, height))
    exact, fast = (tile_image(decode(data, is_fast=is_fast), MAX_TILES)[0] for is_fast in (False, True))
    apart = np.abs(exact.astype(int) - fast)
    exact_ms, fast_ms = measure_median_ms(
        lambda: tile_image(decode(data, is_fast=False), MAX_TILES),
        lambda: tile_image(decode(data, is_fast=True), MAX_TILES),
    )
    return {
        "factor": choose_reduction(width, height, MAX_TILES),
        "ms": exact_ms,
        "fast ms": fast_ms,
        "bytes that differ, %": 100 * float((apart > 0).mean()),
        "mean difference": float(apart.mean()),
        "largest difference": int(apart.max()),
    }


def compare_captions(count: int) -> dict[str, float]:
    processor, engine = Processor.from_pretrained("demo"), OvisEngine.from_pretrained("demo", device="cpu")
    tile_size = processor.config.vision.image_size
    drawn = [make_picture(FIRST_SEED + i, held_out=True) for i in range(count)]
    files = [encode_jpeg(image.resize((image.width * ENLARGED, image.height * ENLARGED))) for image, _ in drawn]
    captions = []
    for is_fast in (False, True):
        images = [decode(data, is_fast=is_fast, tile_size=tile_size) for data in files]
        requests = [processor.build_request("Describe the image.", [image], MAX_TILES) for image in images]
        completions = engine.generate(requests, SamplingParams(max_new_tokens=32))
        captions.append([processor.detokenize(completion.output_ids) for completion in completions])
    exact, fast = captions
    truths = [scene.caption for _, scene in drawn]
    sizes = [(image.width * ENLARGED, image.height * ENLARGED) for image, _ in drawn]
    return {
        "images": count,
        "reduced": sum(choose_reduction(*size, MAX_TILES, tile_size) > 1 for size in sizes),
        "right": sum(map(str.__eq__, exact, truths)),
        "right, fast": sum(map(str.__eq__, fast, truths)),
        "equal captions": sum(map(str.__eq__, exact, fast)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    results = {f"{width} x {height}": measure_size(width, height) for width, height in SIZES}
    print("size          " + "  ".join(f"{name:>20}" for name in next(iter(results.values()))))
    for size, figures in results.items():
        print(f"{size:14}" + "  ".join(f"{value:20.2f}" for value in figures.values()))
    captions = compare_captions(args.images)
    print(captions)
    print(json.dumps({"tiles": results, "captions": captions}))


if __name__ == "__main__":
    main()
