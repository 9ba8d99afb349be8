"""Train the demo's vision tower alone, as a stand-in for the pretrained tower that Ovis2 begins with.

    python -m demo.vision DIRECTORY

DIRECTORY is what `demo.start` wrote; it gets weights: a trained tower, and everything else as it is drawn. Linear
layers, which are thrown away, read colour, shape and size of the object at each visual token, and the digits of
numbers. Through a language model the same takes a hundred times as many images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from demo.drawings import COLOURS, SHAPES, SIZES, Scene, make_picture, make_scattered_picture
from ovis_model.config import OvisConfig
from ovis_model.inputs.tiling import choose_grid, tile_images
from ovis_model.network.ovis import Ovis
from ovis_model.network.vision import merge_patches
from ovis_model.training.export import export_network, make_network

NUM_STEPS, NUM_IMAGES, LEARNING_RATE = 1600, 32, 1e-3
FIRST_SEED = 900_000_000
_NAMES = (tuple(COLOURS), tuple(SHAPES), tuple(SIZES))
_WARM_UP_STEPS, _FALL = 50, 0.6
_MAX_TILES, _NUM_DIGITS = 9, 3
_WEIGHTS = (1.0, 1.0, 1.0, 0.3)  # of colour, shape, size and digits; those, read from all tokens at once, disturb most
_NOTHING = 0  # the label where no object or digit is; the others count from 1


class Labels(NamedTuple):
    """What T tiles of K visual tokens show.

    objects: int64[T, K, 3], numbers of colour, shape and size of the object whose centre is there.
    digits: int64[T, 3]; tiles that show no number, or a part of it, have -1.
    """

    objects: NDArray[np.int64]
    digits: NDArray[np.int64]


def main() -> None:
    """Train the tower and write the weights."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    network = make_network(OvisConfig.from_directory(directory), seed=0)
    train_tower(network, NUM_STEPS)
    export_network(network, directory, directory, {"stage": "vision tower alone", "steps": NUM_STEPS})


def train_tower(network: Ovis, num_steps: int) -> None:
    """Train the tower of `network` in place; print the loss and the shares of right labels."""
    readers = LabelReaders(network)
    backbone = network.visual_tokenizer.backbone
    parameters = [*backbone.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * compute_factor(step, num_steps)
        losses, right = readers.read(network, *draw_batch(FIRST_SEED + step * NUM_IMAGES, network))
        (losses * torch.tensor(_WEIGHTS)).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in right.items())
            print(f"step {step + 1} of {num_steps}: loss {losses.sum():.3f}, {shares}", flush=True)


def compute_factor(step: int, num_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak: a warm-up, a plateau, then a linear fall."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS, max(0.02, (num_steps - step) / (num_steps * (1 - _FALL))))


class LabelReaders(nn.Module):
    """Linear layers that read labels from merged features, [T, K, 4H]."""

    def __init__(self, network: Ovis) -> None:
        super().__init__()
        config = network.config.vision
        width = config.hidden_size * config.hidden_stride**2
        self.objects = nn.ModuleList(nn.Linear(width, 1 + len(names)) for names in _NAMES)
        self.digits = nn.Linear(width * config.tokens_per_tile, _NUM_DIGITS * 11)
        self._scale = width**-0.5

    def read(self, network: Ovis, tiles: Tensor, sizes: Tensor, labels: Labels) -> tuple[Tensor, dict[str, float]]:
        """Return the losses of colour, shape, size and digits, float32[4], and the shares of right labels."""
        backbone = network.visual_tokenizer.backbone
        hidden = backbone.preprocessor(network.normalize(tiles, sizes))
        for block in backbone.trunk.blocks:
            hidden, update = block(hidden, None)
            hidden = hidden + update
        features = merge_patches(hidden, network.config.vision.hidden_stride)
        features = features / features.norm(dim=-1, keepdim=True).clamp_min(1e-6) / self._scale
        pairs = [(reader(features), torch.from_numpy(labels.objects[..., i])) for i, reader in enumerate(self.objects)]
        wanted = torch.from_numpy(labels.digits)
        digits = self.digits(features[wanted[:, 0] >= 0].flatten(1)).view(-1, _NUM_DIGITS, 11)
        pairs.append((digits, wanted[wanted[:, 0] >= 0]))
        losses = torch.stack([_compute_loss(found.flatten(0, 1), true.flatten()) for found, true in pairs])
        shares = [_measure(found, true) for found, true in pairs]
        return losses, dict(zip(("colour", "shape", "size", "digits"), shares, strict=True))


def _compute_loss(found: Tensor, true: Tensor) -> Tensor:
    """Return the mean loss, in which tokens that show nothing count little: they are many, and easy."""
    weights = torch.ones(found.shape[-1])
    weights[_NOTHING] = 0.1
    return F.cross_entropy(found, true, weights)


def _measure(found: Tensor, true: Tensor) -> float:
    """Return the share of right labels where there is something."""
    is_there = true != _NOTHING
    return float((found.argmax(-1) == true)[is_there].float().mean())


def draw_batch(first_seed: int, network: Ovis) -> tuple[Tensor, Tensor, Labels]:
    """Draw images from NUM_IMAGES seeds: uint8[T, 3, S, S], int32[T, 2] and their labels."""
    side = network.config.vision.image_size
    drawn = [draw_seed(seed) for seed in range(first_seed, first_seed + NUM_IMAGES)]
    parts = [(*tile_images([image], _MAX_TILES, side), image, scene) for image, scene in drawn]
    labels = [
        label_tile(scene, view, size, side)
        for _, sizes, image, scene in parts
        for view, size in zip(list_views(image, side), sizes.tolist(), strict=True)
    ]
    tiles, sizes = (np.concatenate([part[i] for part in parts]) for i in range(2))
    joined = Labels(np.stack([x.objects for x in labels]), np.stack([x.digits for x in labels]))
    return torch.from_numpy(tiles), torch.from_numpy(sizes), joined


def draw_seed(seed: int) -> tuple[Image.Image, Scene]:
    """Draw many small objects, a number, or what captions are about."""
    turn = seed % 4
    if turn in (0, 2):
        return make_scattered_picture(seed, held_out=False)
    return make_picture(seed, held_out=False, kind="number" if turn == 1 else None)


class TileView(NamedTuple):
    """The part of an image that a tile shows, in shares of width and height."""

    left: float
    top: float
    width: float
    height: float


def list_views(image: Image.Image, side: int) -> Iterator[TileView]:
    """Yield the view of each tile of an image: those of the grid after the overview, if there is one."""
    grid = choose_grid(*image.size, _MAX_TILES, side)
    yield TileView(0, 0, 1, 1)
    if grid.rows * grid.cols > 1:
        for row in range(grid.rows):
            for column in range(grid.cols):
                yield TileView(column / grid.cols, row / grid.rows, 1 / grid.cols, 1 / grid.rows)


def label_tile(scene: Scene, view: TileView, size: Sequence[int], side: int) -> Labels:
    """Label the visual tokens of a tile that shows `view` in its middle, in a `size` of (height, width) pixels."""
    per_side = 3
    objects = np.full((per_side, per_side, len(_NAMES)), _NOTHING, np.int64)
    height, width = size
    for thing in scene.things:
        x, y = (thing.x - view.left) / view.width, (thing.y - view.top) / view.height
        if 0 <= x < 1 and 0 <= y < 1:
            named = zip(_NAMES, (thing.colour, thing.shape, thing.size), strict=True)
            column, row = (
                int((0.5 + (at - 0.5) * length / side) * per_side) for at, length in ((x, width), (y, height))
            )
            objects[row, column] = [1 + names.index(name) for names, name in named]
    digits = [1 + int(digit) for digit in scene.number.ljust(_NUM_DIGITS, "x") if digit != "x"]
    digits += [_NOTHING] * (_NUM_DIGITS - len(digits))
    is_whole = bool(scene.number) and view == TileView(0, 0, 1, 1)
    return Labels(objects.reshape(-1, len(_NAMES)), np.array(digits if is_whole else [-1] * _NUM_DIGITS))


if __name__ == "__main__":
    main()
