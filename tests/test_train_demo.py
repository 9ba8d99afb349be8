"""Training the demo model: exercises of a picture that share a prefix are learnt as if each were alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from demo.train import QUESTIONS, Example, Exercise, _compute_loss, _make_example
from ovis_model.checkpoint import DEMO_DIRECTORY
from ovis_model.inputs.processor import Processor
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import load_model


def test_tasks_after_a_shared_prefix_have_the_same_loss_as_alone() -> None:
    model = load_model(DEMO_DIRECTORY, device=torch.device("cpu"), dtype=torch.float32)
    processor = Processor.from_pretrained(DEMO_DIRECTORY)
    examples = [_make_example(processor, seed, held_out=False, num_draws=3) for seed in range(30)]
    several_tiles = [example for example in examples if example.num_tiles == 3][:2]
    with torch.inference_mode():
        alone = [
            _compute_losses_alone(model, example, exercise)
            for example in several_tiles
            for exercise in example.exercises
        ]
        assert _compute_loss(model, several_tiles).item() == pytest.approx(torch.cat(alone).mean().item(), rel=1e-4)


def _compute_losses_alone(model: Ovis, example: Example, exercise: Exercise) -> Tensor:
    """Return the loss of each target token: float32[T]."""
    prompt = torch.from_numpy(exercise.request.input_ids).long()
    input_ids = torch.cat((prompt, exercise.target_ids[:-1]))
    tiles, sizes = torch.from_numpy(exercise.request.tiles), torch.from_numpy(exercise.request.tile_sizes)
    visual = model.encode_tiles(model.normalize(tiles, sizes)).flatten(0, 1)
    embeds = model.embed(input_ids, visual)[None]
    logits = model(embeds, torch.arange(len(input_ids))[None])[0, len(prompt) - 1 :]
    return F.cross_entropy(logits, exercise.target_ids, reduction="none")


def test_the_learning_rate_of_questions_rises_and_ends_near_zero() -> None:
    rates = [QUESTIONS.learning_rate(step, QUESTIONS.steps) for step in range(QUESTIONS.steps)]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < rates[peak] and rates[peak:] == sorted(rates[peak:], reverse=True) and rates[-1] < 1e-6
