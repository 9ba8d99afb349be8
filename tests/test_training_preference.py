"""Preference losses equal their closed forms, and pairs share their images and prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ovis_model.training.examples import PreferenceExample
from ovis_model.training.optimizer import Optimizer, Schedule
from ovis_model.training.parts import group_parameters
from ovis_model.training.preference import (
    collate_pairs,
    compute_dpo_losses,
    compute_preference_loss,
    compute_reference,
    fingerprint_pairs,
)
from tests.support.training import (
    compute_gradients,
    draw_images,
    load_training_model,
    make_batch,
    make_builder,
    measure_difference,
)

POLICY, REFERENCE = (1 / 8, 1 / 4), (1 / 16, 1 / 2)  # probabilities of the chosen and the rejected answer


@pytest.mark.parametrize(
    ("beta", "loss", "gradient"), [(0.5, math.log(1.5), 1 / 6), (1.0, math.log(1.25), 0.2), (0.1, 0.626233, 0.0465398)]
)
def test_the_loss_of_a_pair_by_hand(beta: float, loss: float, gradient: float) -> None:
    policy = torch.tensor([POLICY], dtype=torch.float64).log().requires_grad_()
    losses, rewards = compute_dpo_losses(policy, torch.tensor([REFERENCE], dtype=torch.float64).log(), beta)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert float(losses.detach()) == pytest.approx(loss, abs=1e-6)
    assert policy.grad is not None
    assert policy.grad[0].tolist() == pytest.approx([-gradient, gradient], abs=1e-6)
    assert rewards[0].tolist() == pytest.approx([beta * math.log(2), -beta * math.log(2)])


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_the_loss_begins_at_the_logarithm_of_two(beta: float) -> None:
    policy = torch.tensor([POLICY]).log().requires_grad_()
    losses, _ = compute_dpo_losses(policy, policy.detach(), beta)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert float(losses.detach()) == pytest.approx(math.log(2))
    assert policy.grad is not None
    assert policy.grad[0].tolist() == pytest.approx([-beta / 2, beta / 2])


def make_pairs() -> list[PreferenceExample]:
    """Make pairs about one image, two images and text, with answers of unequal lengths."""
    builder = make_builder()
    return [
        builder.build_preference([("user", "What is it?")], "A dog on a red sofa.", "A cat.", draw_images(0, (1, 2))),
        builder.build_preference([("user", "Say hello.")], "Hello!", "Go away, I am busy now."),
        builder.build_preference(
            [("user", "<image> or <image>?"), ("assistant", "B"), ("user", "Why?")],
            "It is larger.",
            "It is red.",
            draw_images(1, (1, 1), (1, 1)),
        ),
    ]


def test_pairs_are_computed_as_if_each_answer_were_alone() -> None:
    model, pairs = load_training_model(), make_pairs()
    batch = collate_pairs(pairs, model.network.config.vision)
    assert len(batch.tiles) == sum(len(pair.tiles) for pair in pairs)
    alone = [make_batch(model, [example]) for pair in pairs for example in pair.split()]
    with torch.no_grad():
        wanted = torch.cat([model.compute_logprobs(x) for x in alone])
        torch.testing.assert_close(model.compute_logprobs(batch), wanted, atol=2e-5, rtol=1e-5)
    assert measure_difference(compute_gradients(model, batch), compute_gradients(model, *alone)) < 1e-5
    # A prompt with an image stands in the row once.
    first = collate_pairs(pairs[:1], model.network.config.vision)
    assert len(first.input_ids) == sum(map(len, (pairs[0].prompt_ids, pairs[0].chosen_ids, pairs[0].rejected_ids)))


def test_pairs_in_one_batch_have_the_gradients_of_each_alone() -> None:
    model, pairs = load_training_model(), make_pairs()
    vision, gradients = model.network.config.vision, []
    for size in (3, 1):
        model.zero_grad(set_to_none=True)
        for start in range(0, len(pairs), size):
            batch = collate_pairs(pairs[start : start + size], vision)
            reference = compute_reference(model, batch) + torch.tensor([1.0, -2.0])
            compute_preference_loss(model, batch, reference, beta=0.3, nll_weight=0.2).sum.backward()  # type: ignore[no-untyped-call]
        gradients.append({n: x.grad.clone() for n, x in model.network.named_parameters() if x.grad is not None})
    assert measure_difference(gradients[0], gradients[1]) < 1e-5


def test_the_likelihood_term_is_the_mean_over_the_chosen_answers_ids() -> None:
    model, pairs = load_training_model(), make_pairs()
    batch = collate_pairs(pairs, model.network.config.vision)
    reference = compute_reference(model, batch)
    plain, added = (compute_preference_loss(model, batch, reference, nll_weight=weight) for weight in (0.0, 0.5))
    assert float(plain.sum.detach()) == pytest.approx(3 * math.log(2), rel=1e-6)
    lengths = torch.tensor([len(pair.chosen_ids) for pair in pairs])
    wanted = 0.5 * (-reference[:, 0] / lengths).sum()
    assert float((added.sum - plain.sum).detach()) == pytest.approx(float(wanted), rel=1e-5)
    assert not plain.chosen_rewards.any() and not plain.rejected_rewards.any()


def test_training_prefers_the_chosen_answers() -> None:
    model, pairs = load_training_model(), make_pairs()
    batch = collate_pairs(pairs, model.network.config.vision)
    reference = compute_reference(model, batch)
    optimizer = Optimizer(group_parameters(model.network, 1e-3), Schedule(num_steps=10, decay="constant"))
    for _ in range(10):
        loss = compute_preference_loss(model, batch, reference)
        loss.sum.backward()  # type: ignore[no-untyped-call]
        optimizer.step(len(pairs))
    assert bool((loss.chosen_rewards > loss.rejected_rewards + 0.5).all())


def test_the_fingerprint_changes_with_whatever_decides_the_reference() -> None:
    pair = make_pairs()[0]
    changed = [
        replace(pair, prompt_ids=pair.prompt_ids + 1),
        replace(pair, rejected_ids=pair.rejected_ids[:-1]),
        replace(pair, tiles=np.roll(pair.tiles, 1)),
        replace(pair, tile_sizes=pair.tile_sizes - 1),
    ]
    found = {fingerprint_pairs([x], "weights") for x in (pair, *changed)} | {fingerprint_pairs([pair], "others")}
    assert len(found) == 6
    assert fingerprint_pairs([pair], "weights") == fingerprint_pairs(make_pairs()[:1], "weights")
