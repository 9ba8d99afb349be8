"""Lay out examples as one batch without padding.

All examples stand one after another in one row of tokens. Only attention knows where they end, so every other layer
computes no padding, and packing is exact by construction. Examples that share their images also share the beginning of
their rows: it stands there once, and each of them attends to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovis_model.config import VisionConfig
from ovis_model.training.examples import IGNORED_LABEL, TrainingExample
from ovis_model.types import IMAGE_ATOM_ID


@dataclass(frozen=True, eq=False)
class Batch:
    """B examples in one row of T tokens.

    input_ids, position_ids: int64[T]; positions count from 0 in each example.
    visual: int64[A]; for each of the A placeholders of visual tokens, its number among the visual tokens of all tiles.
    order: int64[M]; where in the row the tokens of each example are, one example after another. M exceeds T if examples
        share a beginning.
    sources, targets, owners: int64[K]; the token at `sources` predicts the id `targets` of example `owners`.
    lengths: the tokens of each example; their sum is M.
    tiles: uint8[N, 3, S, S], tile_sizes: int32[N, 2]; without images there is one black tile, which no placeholder
        takes, so that every batch gives all parameters a gradient.
    """

    input_ids: Tensor
    position_ids: Tensor
    visual: Tensor
    order: Tensor
    sources: Tensor
    targets: Tensor
    owners: Tensor
    lengths: tuple[int, ...]
    tiles: Tensor
    tile_sizes: Tensor

    @property
    def num_targets(self) -> int:
        """The number of ids that are learnt."""
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def collate(examples: Sequence[TrainingExample], config: VisionConfig) -> Batch:
    """Lay out examples in their order; those that share their `tiles` object must follow each other.

    Raise ValueError without examples.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    families = [list(family) for _, family in groupby(examples, _identify_images)]
    rows = list(_lay_out(families))
    parts = zip(_Row._fields, zip(*rows, strict=True), strict=True)
    joined = {name: torch.from_numpy(np.concatenate(arrays).astype(np.int64)) for name, arrays in parts}
    tiles, tile_sizes = _join_tiles([family[0] for family in families], config.image_size)
    lengths = tuple(len(example.input_ids) for example in examples)
    return Batch(**joined, lengths=lengths, tiles=tiles, tile_sizes=tile_sizes)


class _Row(NamedTuple):
    """The part of one example that stands in the row; the fields are those of `Batch`."""

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int64]
    visual: NDArray[np.int64]
    order: NDArray[np.int64]
    sources: NDArray[np.int64]
    targets: NDArray[np.int32]
    owners: NDArray[np.int64]


def _identify_images(example: TrainingExample) -> int:
    """Return a number that examples share if they have the same images."""
    return id(example.tiles) if len(example.tiles) else id(example)


def _lay_out(families: Sequence[Sequence[TrainingExample]]) -> Iterator[_Row]:
    start = owner = first_visual = 0
    for family in families:
        shared, first = _count_shared(family), start
        for number, example in enumerate(family):
            own = np.arange(start, start + len(example.input_ids) - (shared if number else 0))
            order = own if number == 0 else np.concatenate([np.arange(first, first + shared), own])
            yield _make_row(example, order, len(own), first_visual, owner)
            start, owner = start + len(own), owner + 1
        first_visual += int((family[0].input_ids == IMAGE_ATOM_ID).sum())


def _make_row(example: TrainingExample, order: NDArray[np.int64], num_own: int, first_visual: int, owner: int) -> _Row:
    begin, is_atom = len(order) - num_own, example.input_ids == IMAGE_ATOM_ID
    visual = first_visual + np.arange(is_atom[:begin].sum(), is_atom.sum())
    predicts = np.flatnonzero(example.labels[1:] != IGNORED_LABEL)  # position i predicts the label of i + 1
    return _Row(
        input_ids=example.input_ids[begin:],
        position_ids=np.arange(begin, len(order)),
        visual=visual,
        order=order,
        sources=order[predicts],
        targets=example.labels[predicts + 1],
        owners=np.full(len(predicts), owner),
    )


def _count_shared(family: Sequence[TrainingExample]) -> int:
    """Count the tokens at the beginning that are the same in all examples and that none of them learns."""
    first, *others = family
    shared = min(_count_unlearnt(example) for example in family)
    for other in others:
        differs = np.flatnonzero(first.input_ids[:shared] != other.input_ids[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


def _count_unlearnt(example: TrainingExample) -> int:
    learnt = np.flatnonzero(example.labels != IGNORED_LABEL)
    return int(learnt[0]) if len(learnt) else len(example.labels)


def _join_tiles(examples: Sequence[TrainingExample], side: int) -> tuple[Tensor, Tensor]:
    tiles = [example.tiles for example in examples if len(example.tiles)]
    sizes = [example.tile_sizes for example in examples if len(example.tiles)]
    if not tiles:
        return torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.full((1, 2), side, dtype=torch.int32)
    return torch.from_numpy(np.concatenate(tiles)), torch.from_numpy(np.concatenate(sizes))
