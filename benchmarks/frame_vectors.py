"""How many objects eight frames show when they are chosen for difference alone, by several kinds of vectors.

    OMP_NUM_THREADS=1 python -m benchmarks.frame_vectors

On drawn videos of eight scenes with an object each, which jumps from frame to frame: all as long, or the first of them
nine times as long as the others, also with nothing moving in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from ovis_model.checkpoint import DEMO_DIRECTORY
from ovis_model.inputs.keyframes import select_frames, select_uniform
from ovis_model.network.weights import load_model
from pipelines.media.frame_selection import PixelEncoder
from tests.support.objects import draw_object, draw_scenes

NUM_VIDEOS, NUM_FRAMES = 20, 8

Vectors = Callable[[list[Image.Image]], np.ndarray]


def main() -> None:
    torch.set_num_threads(1)
    kinds: dict[str, Vectors] = {"pixels": by_pixels, "visual embedding": by_demo("vte"), "visual token": by_demo("")}
    for name, make in (("equal scenes", equal), ("a long scene", one_long), ("a long still scene", one_still)):
        videos = [make(seed) for seed in range(NUM_VIDEOS)]
        even = np.mean([len(set(labels[select_uniform(128, NUM_FRAMES)])) for labels, _ in videos])
        print(f"{name}: evenly spread {even:.2f}")
        for kind, vectors in kinds.items():
            started_s = time.process_time()
            chosen = [labels[select_frames(vectors(images), None, NUM_FRAMES)] for labels, images in videos]
            seconds = (time.process_time() - started_s) / NUM_VIDEOS
            print(
                f"  {kind:16} {np.mean([len(set(labels)) for labels in chosen]):.2f} objects, {seconds:.3f} s a video"
            )


def equal(seed: int) -> tuple[np.ndarray, list[Image.Image]]:
    """The scene of each frame, and the frames."""
    return np.repeat(np.arange(8), 16), draw_scenes(seed)[1]


def one_long(seed: int) -> tuple[np.ndarray, list[Image.Image]]:
    things, images = draw_scenes(seed + 100)
    random = np.random.default_rng(seed)
    return _long([draw_object(things[0], random) for _ in range(72)], images)


def one_still(seed: int) -> tuple[np.ndarray, list[Image.Image]]:
    things, images = draw_scenes(seed + 100)
    return _long([draw_object(things[0], np.random.default_rng(seed))] * 72, images)


def _long(long: list[Image.Image], images: list[Image.Image]) -> tuple[np.ndarray, list[Image.Image]]:
    others = [image for scene in range(1, 8) for image in images[scene * 16 : scene * 16 + 8]]
    return np.concatenate([np.zeros(72, int), np.repeat(np.arange(1, 8), 8)]), long + others


def by_pixels(images: list[Image.Image]) -> np.ndarray:
    return PixelEncoder().encode_frames(stacked(images, PixelEncoder.size[0]))


def by_demo(what: str) -> Vectors:
    """The mean over a frame of its visual embeddings, or of its visual tokens."""
    model = load_model(DEMO_DIRECTORY, device=torch.device("cpu"), dtype=torch.float32)
    side = model.config.vision.image_size

    @torch.inference_mode()
    def vectors(images: list[Image.Image]) -> np.ndarray:
        tiles = torch.from_numpy(stacked(images, side)).permute(0, 3, 1, 2)
        pixels = model.normalize(tiles, torch.full((len(images), 2), side))
        encode = model.encode_tiles if what == "vte" else model.visual_tokenizer
        return torch.cat([encode(part).mean(dim=1) for part in torch.split(pixels, 16)]).numpy()

    return vectors


def stacked(images: list[Image.Image], side: int) -> np.ndarray:
    return np.stack([np.asarray(image.resize((side, side))) for image in images])


if __name__ == "__main__":
    main()
