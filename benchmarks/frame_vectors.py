"""Count the objects that eight frames show when they are chosen for difference alone, by kind of frame vector.

    OMP_NUM_THREADS=1 python -m benchmarks.frame_vectors

The videos are drawn: eight scenes with one object each, which jumps from frame to frame. Either all scenes have the
same length, or the first is nine times as long as each other one, with the object moving or still.
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

EncodeFrames = Callable[[list[Image.Image]], np.ndarray]


def main() -> None:
    torch.set_num_threads(1)
    encoders: dict[str, EncodeFrames] = {
        "pixels": encode_pixels,
        "visual embedding": load_demo_encoder("vte"),
        "visual token": load_demo_encoder(""),
    }
    cases = {"equal scenes": draw_equal_scenes, "a long scene": draw_long_scene, "a long still scene": draw_still_scene}
    for name, draw_video in cases.items():
        videos = [draw_video(seed) for seed in range(NUM_VIDEOS)]
        even = np.mean([len(set(labels[select_uniform(128, NUM_FRAMES)])) for labels, _ in videos])
        print(f"{name}: evenly spread {even:.2f}")
        for kind, encode in encoders.items():
            started_s = time.process_time()
            chosen = [labels[select_frames(encode(images), None, NUM_FRAMES)] for labels, images in videos]
            seconds = (time.process_time() - started_s) / NUM_VIDEOS
            print(f"  {kind:16} {np.mean([len(set(c)) for c in chosen]):.2f} objects, {seconds:.3f} s per video")


def draw_equal_scenes(seed: int) -> tuple[np.ndarray, list[Image.Image]]:
    """Return the scene number of each frame, and the frames."""
    return np.repeat(np.arange(8), 16), draw_scenes(seed)[1]


def draw_long_scene(seed: int) -> tuple[np.ndarray, list[Image.Image]]:
    things, images = draw_scenes(seed + 100)
    random = np.random.default_rng(seed)
    return _join_long_scene([draw_object(things[0], random) for _ in range(72)], images)


def draw_still_scene(seed: int) -> tuple[np.ndarray, list[Image.Image]]:
    things, images = draw_scenes(seed + 100)
    return _join_long_scene([draw_object(things[0], np.random.default_rng(seed))] * 72, images)


def _join_long_scene(long: list[Image.Image], images: list[Image.Image]) -> tuple[np.ndarray, list[Image.Image]]:
    others = [image for scene in range(1, 8) for image in images[scene * 16 : scene * 16 + 8]]
    return np.concatenate([np.zeros(72, int), np.repeat(np.arange(1, 8), 8)]), long + others


def encode_pixels(images: list[Image.Image]) -> np.ndarray:
    return PixelEncoder().encode_frames(stack_resized(images, PixelEncoder.size[0]))


def load_demo_encoder(kind: str) -> EncodeFrames:
    """Return an encoder by the demo model: a frame's mean visual embedding for "vte", else its mean visual token."""
    model = load_model(DEMO_DIRECTORY, device=torch.device("cpu"), dtype=torch.float32)
    side = model.config.vision.image_size

    @torch.inference_mode()
    def encode_frames(images: list[Image.Image]) -> np.ndarray:
        tiles = torch.from_numpy(stack_resized(images, side)).permute(0, 3, 1, 2)
        pixels = model.normalize(tiles, torch.full((len(images), 2), side))
        encode = model.encode_tiles if kind == "vte" else model.visual_tokenizer
        return torch.cat([encode(part).mean(dim=1) for part in torch.split(pixels, 16)]).numpy()

    return encode_frames


def stack_resized(images: list[Image.Image], side: int) -> np.ndarray:
    return np.stack([np.asarray(image.resize((side, side))) for image in images])


if __name__ == "__main__":
    main()
