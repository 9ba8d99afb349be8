"""Models and requests that benchmarks of the engine run: checkpoints, or shapes with random weights."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import SIZES, LanguageConfig, OvisConfig, Quantization, VisionConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.prompt import expand_atoms, make_placeholders
from ovis_model.inputs.tiling import choose_grid, tile_image
from ovis_model.network.kernels import FP8, TORCH
from ovis_model.network.ovis import Ovis
from ovis_model.network.quantization import check_fp8_device, get_scales
from ovis_model.network.tensor_parallel import ALONE, Shard
from ovis_model.network.weights import allocate_model, load_model
from ovis_model.types import Request, SamplingParams

SHAPES = {
    **SIZES,
    "24x128": OvisConfig(
        vision=VisionConfig(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=112,
            vocab_size=517,
        ),
        language=LanguageConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=640,
            tie_word_embeddings=True,
        ),
    ),
}
NUM_TEXT_TOKENS = 37
"""Text tokens of a prompt, image excluded; about the length of "Describe the image." in Qwen's chat format."""


@dataclass(frozen=True)
class Workload:
    """Requests, the number of output tokens of each, and the seconds that tiling their images took."""

    requests: list[Request]
    output_lengths: list[int]
    preprocess_s: float = 0.0


def load_or_build_model(
    name: str, device: torch.device, dtype: torch.dtype, quantization: Quantization = "none"
) -> Ovis:
    """Load a checkpoint, or build a shape of SHAPES with random weights.

    The vision tower gets the norm that transformers adds after it, so that both sides compute the same.
    """
    if quantization == "fp8":
        check_fp8_device(device)
    if name not in SHAPES:
        directory = fetch_checkpoint(name)
        return load_model(directory, device=device, dtype=dtype, post_trunk_norm=True, quantization=quantization)
    return build_random_model(SHAPES[name], device, dtype, quantization=quantization)


def build_random_model(
    config: OvisConfig,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard = ALONE,
    quantization: Quantization = "none",
) -> Ovis:
    """Allocate a model and draw its weights."""
    model = allocate_model(
        config, device=device, dtype=dtype, post_trunk_norm=True, shard=shard, quantization=quantization
    )
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dtype != FP8:
            parameter.normal_(std=0.05, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Linear) and (scales := get_scales(module)) is not None:
            drawn = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(std=0.05, generator=generator)
            values, drawn_scales = TORCH.quantize_rows(drawn)
            module.weight.copy_(values)
            scales.copy_(drawn_scales)
    return model


def make_workload(config: OvisConfig, args: argparse.Namespace) -> Workload:
    """Draw images, tile them, and draw the lengths of answers by the options of `benchmarks.engine`."""
    rng = np.random.default_rng(args.seed)
    output_lengths = np.exp(rng.normal(math.log(args.output_median), 0.6, args.rows)).clip(1, args.output_cap)
    images = draw_images(args.image_size, args.rows, args.seed)
    started_s = time.perf_counter()
    requests = [_make_request(config, rng, image, args.max_tiles) for image in images]
    return Workload(requests, output_lengths.astype(int).tolist(), time.perf_counter() - started_s)


def draw_images(size: str, count: int, seed: int) -> Iterator[Image.Image]:
    """Yield images of `size`, e.g. "640x480": coarse noise, enlarged."""
    rng = np.random.default_rng(seed)
    width, height = map(int, size.split("x"))
    for _ in range(count):
        yield Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))


def _make_request(config: OvisConfig, rng: np.random.Generator, image: Image.Image, max_tiles: int) -> Request:
    side_px = config.vision.image_size
    tiles, sizes = tile_image(image, max_tiles, side_px)
    atoms = make_placeholders(choose_grid(*image.size, max_tiles, side_px))
    placeholders = expand_atoms(atoms, config.vision.tokens_per_tile)
    text = rng.integers(0, config.language.vocab_size // 2, NUM_TEXT_TOKENS, dtype=np.int32)
    return Request(np.concatenate([text[:12], placeholders, text[12:]]).astype(np.int32), tiles, sizes)


def run_engine(engine: OvisEngine, workload: Workload) -> list[list[int]]:
    """Generate; return the output ids of each request."""
    params = [SamplingParams(max_new_tokens=length) for length in workload.output_lengths]
    return [completion.output_ids.tolist() for completion in engine.generate(workload.requests, params)]
