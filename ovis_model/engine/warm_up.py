"""Run the largest work that an engine may get, so that it runs out of memory at the start or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ovis_model.config import VisionConfig
from ovis_model.engine.prefix_sharing import Item
from ovis_model.types import IMAGE_ATOM_ID, Request, SamplingParams

if TYPE_CHECKING:
    from ovis_model.engine.engine_core import EngineCore


def run_largest_work(core: EngineCore) -> None:
    """Run the largest passes over tiles and prompts, decode steps of all batch sizes, and passes of all tile counts."""
    vision = core.model.config.vision
    _generate(core, [_make_tile_request(vision)] * core.scheduler.budget.slots, itertools.repeat(2))
    slots = core.scheduler.slots
    _generate(core, [_make_text_request(vision)] * slots, range(slots + 1, 1, -1))  # one request fewer in each step
    _encode_each_count(core, _make_tile_request(vision))


def _generate(core: EngineCore, requests: Sequence[Request], output_lengths: Iterable[int]) -> None:
    params = [SamplingParams(max_new_tokens=n) for _, n in zip(requests, output_lengths, strict=False)]
    states = core.enqueue(requests, params)
    while not all(state.has_left for state in states):
        core.step()
    for state in states:
        state.make_completion()


@torch.inference_mode()
def _encode_each_count(core: EngineCore, request: Request) -> None:
    max_tiles = core.scheduler.budget.vision_tiles
    for count in range(1, max_tiles + 1):
        item = Item(np.repeat(request.tiles, count, 0), np.repeat(request.tile_sizes, count, 0))
        core.runner.encode([item], max_tiles)


def _make_tile_request(vision: VisionConfig) -> Request:
    tile = np.zeros((1, 3, vision.image_size, vision.image_size), np.uint8)
    ids = np.full(vision.tokens_per_tile, IMAGE_ATOM_ID, np.int32)
    return Request(ids, tile, np.array([tile.shape[2:]], np.int32))


def _make_text_request(vision: VisionConfig) -> Request:
    none = np.zeros((0, 3, vision.image_size, vision.image_size), np.uint8)
    return Request(np.zeros(1, np.int32), none, np.zeros((0, 2), np.int32))
