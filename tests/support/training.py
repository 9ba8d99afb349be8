"""Examples for the golden checkpoints, and gradients of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ovis_model.config import OvisConfig
from ovis_model.inputs.tiling import count_tiles
from ovis_model.network.ovis import Ovis
from ovis_model.tokenizer import load_tokenizer
from ovis_model.training.batch import Batch, collate
from ovis_model.training.examples import ExampleBuilder, TiledImages, TrainingExample
from ovis_model.training.export import load_network
from ovis_model.training.model import TrainingModel
from ovis_model.training.parts import choose_trainable
from ovis_model.training.stages import STAGES
from ovis_model.types import Grid
from tests.support.golden_data import checkpoint_dir

TINY = checkpoint_dir("tiny56-tied")


def make_builder(directory: Path = TINY, max_length: int | None = None) -> ExampleBuilder:
    return ExampleBuilder(OvisConfig.from_directory(directory), load_tokenizer(directory), max_length)


def draw_images(seed: int, *grids: tuple[int, int], directory: Path = TINY) -> TiledImages:
    """Draw random tiles for images cut by `grids`; the crop of each tile leaves a border of another width."""
    side, rng = OvisConfig.from_directory(directory).vision.image_size, np.random.default_rng(seed)
    count = sum(count_tiles(Grid(*grid)) for grid in grids)
    tiles = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    sizes = rng.integers(side // 2, side + 1, (count, 2), dtype=np.int32)
    return TiledImages(tiles, sizes, tuple(Grid(*grid) for grid in grids))


def make_examples(directory: Path = TINY) -> list[TrainingExample]:
    """Make rows of unequal lengths: one image, two of them, frames of a video, text alone, several answers."""
    builder = make_builder(directory)

    def draw(seed: int, *grids: tuple[int, int]) -> TiledImages:
        return draw_images(seed, *grids, directory=directory)

    return [
        builder.build_dialogue([("user", "What is it?"), ("assistant", "A dog on a sofa.")], draw(0, (1, 2))),
        builder.build_dialogue([("user", "Say hello."), ("assistant", "Hello!")]),
        builder.build_dialogue(
            [("user", "<image> or <image>?"), ("assistant", "B"), ("user", "Why?"), ("assistant", "It is larger.")],
            draw(1, (1, 1), (2, 2)),
        ),
        builder.build_dialogue(
            [("system", "Be brief."), ("user", "<image>\n<image>\n<image>\nWhat moves?"), ("assistant", "A red ball")],
            draw(2, (1, 1), (1, 1), (1, 1)),
        ),
    ]


def load_training_model(directory: Path = TINY, parts: str = STAGES["4"], **options: object) -> TrainingModel:
    network = load_network(directory)
    choose_trainable(network, parts)
    return TrainingModel(network, **options)  # type: ignore[arg-type]


def make_batch(model: TrainingModel, examples: Sequence[TrainingExample]) -> Batch:
    return collate(examples, model.network.config.vision)


def compute_gradients(model: TrainingModel, *batches: Batch) -> dict[str, Tensor]:
    """Return the gradients of the mean loss over all learnt ids of `batches`."""
    model.zero_grad(set_to_none=True)
    total = sum(batch.num_targets for batch in batches)
    for batch in batches:
        (model.loss_sum(batch)[0] / total).backward()  # type: ignore[no-untyped-call]
    return {name: x.grad.clone() for name, x in model.network.named_parameters() if x.grad is not None}


def measure_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest distance of two gradients of a parameter, relative to the norm of the second."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - x).norm() / (x.norm() + 1e-12)) for name, x in wanted.items())


def hash_parameters(network: Ovis) -> dict[str, bytes]:
    return {name: x.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, x in network.named_parameters()}
