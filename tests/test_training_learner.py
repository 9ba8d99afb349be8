"""A step does not depend on how its rows are cut into micro-batches, and a learner continues from its state exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ovis_model.training.learning.learner import Learner, LearnerOptions, MicroBatch
from ovis_model.training.learning.parallel import World
from ovis_model.training.lora import LoraConfig
from ovis_model.training.optimizer import Schedule
from ovis_model.training.parts import STAGES
from tests.support.divided_learner import take_steps, take_steps_together
from tests.support.training import TINY, make_examples

NUM_STEPS = 20


def make_options(parts: str, **options: Any) -> LearnerOptions:
    given = {"learning_rate": 1e-4, **options}
    return LearnerOptions(parts=parts, schedule=Schedule(num_steps=NUM_STEPS), **given)


def make_learner(parts: str = "all", **options: Any) -> Learner:
    return Learner(TINY, make_options(parts, **options), torch.device("cpu"), World())


def step(learner: Learner, *sizes: int) -> dict[str, float]:
    """Take a step on the four examples, cut into micro-batches of these sizes."""
    examples, ends = make_examples(), np.cumsum(sizes)
    return learner.step([MicroBatch(examples[end - size : end]) for size, end in zip(sizes, ends, strict=True)])


def get_weights(learner: Learner) -> dict[str, Any]:
    return {name: value.copy() for name, value in learner.get_state()}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
def test_accumulation_over_20_steps_equals_one_batch(sizes: tuple[int, ...]) -> None:
    whole, cut = make_learner(), make_learner()
    for _ in range(NUM_STEPS):
        assert step(cut, *sizes)["loss"] == pytest.approx(step(whole, 4)["loss"], rel=1e-5)
    wanted, found = get_weights(whole), get_weights(cut)
    assert max(np.abs(found[name] - wanted[name]).max() for name in wanted if name.startswith("model.")) < 1e-5


def test_a_learner_continues_from_its_state_to_the_bit() -> None:
    whole, begun = make_learner(), make_learner()
    lines = [step(whole, 2, 2) for _ in range(6)]
    for _ in range(3):
        step(begun, 2, 2)
    resumed = make_learner()
    resumed.set_state(get_weights(begun))
    assert [step(resumed, 2, 2) for _ in range(3)] == lines[3:]
    wanted, found = get_weights(whole), get_weights(resumed)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_a_divided_model_with_adapters_takes_the_steps_of_a_whole_one() -> None:
    options = make_options("lora", learning_rate=1e-3, lora=LoraConfig(4), shard=True)
    losses, weights = take_steps_together(options, NUM_STEPS)
    whole = Learner(TINY, options, torch.device("cpu"), World())
    assert losses == pytest.approx(take_steps(whole, list(make_examples()), NUM_STEPS), rel=1e-5)
    wanted = {name: x.detach().numpy() for name, x in whole.network.named_parameters()}
    assert weights.keys() == wanted.keys() and any(".adapter." in name for name in wanted)
    assert max(np.abs(weights[name] - wanted[name]).max() for name in wanted) < 1e-5


def test_a_filler_changes_nothing() -> None:
    plain, filled, examples = make_learner(), make_learner(), make_examples()
    line = plain.step([MicroBatch(examples)])
    assert filled.step([MicroBatch(examples), MicroBatch(examples[:1], is_filler=True)]) == line
    wanted, found = get_weights(plain), get_weights(filled)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_step_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to learn from"):
        make_learner().step([MicroBatch(make_examples()[:1], is_filler=True)])


def test_a_checkpoint_of_other_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="the checkpoint trains other parameters, such as llm"):
        make_learner(STAGES["2"]).set_state(get_weights(make_learner()))


def test_weights_drawn_at_the_start_are_the_same_for_the_same_seed() -> None:
    first, again, other = (make_learner(initialize="all", seed=seed) for seed in (1, 1, 2))
    tables = [x.network.vte.weight.detach().numpy() for x in (first, again, other)]
    assert np.array_equal(tables[0], tables[1]) and not np.array_equal(tables[0], tables[2])
    assert make_learner(initialize="table").network.vte.weight.std() < 1
