"""Learn which of two answers is better: direct preference optimization (DPO, arXiv:2305.18290).

The reference is the model at the start. Its log-probabilities are computed once, before training, so that it need not
stay in memory. The images of a pair are encoded once, and so is its prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ovis_model.config import VisionConfig
from ovis_model.training.batch import Batch, collate
from ovis_model.training.examples import PreferenceExample
from ovis_model.training.model import TrainingModel


@dataclass(frozen=True, eq=False)
class PreferenceLoss:
    """What a batch of P pairs gives; all but `sum` are float32[P] without gradients.

    sum: float32[], the loss summed over pairs. rewards: beta times the log-ratio to the reference.
    logprobs: those of whole answers, in nats.
    """

    sum: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor


def collate_pairs(pairs: Sequence[PreferenceExample], config: VisionConfig) -> Batch:
    """Lay out pairs as one batch, in which example 2i is the chosen and 2i + 1 the rejected answer of pair i."""
    return collate([example for pair in pairs for example in pair.split()], config)


@torch.no_grad()
def compute_reference(model: TrainingModel, batch: Batch) -> Tensor:
    """Return the reference's log-probabilities of a batch of pairs: float32[P, 2], chosen and rejected."""
    return model.compute_logprobs(batch).view(-1, 2)


def compute_preference_loss(
    model: TrainingModel, batch: Batch, reference: Tensor, *, beta: float = 0.1, nll_weight: float = 0.0
) -> PreferenceLoss:
    """Compute the loss of a batch of pairs; `reference` is float32[P, 2].

    `nll_weight` times the mean negative log-probability of the chosen answer's ids is added to each pair's loss. It
    keeps the chosen answers probable, which DPO alone does not.
    """
    logprobs = model.compute_logprobs(batch).view(-1, 2)
    losses, rewards = compute_dpo_losses(logprobs, reference.to(logprobs.device), beta)
    if nll_weight:
        lengths = torch.bincount(batch.owners.to(logprobs.device), minlength=len(batch.lengths)).view(-1, 2)
        losses = losses - nll_weight * logprobs[:, 0] / lengths[:, 0]
    return PreferenceLoss(losses.sum(), *rewards.detach().unbind(1), *logprobs.detach().unbind(1))


def compute_dpo_losses(logprobs: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return losses [P] and rewards [P, 2] for log-probabilities [P, 2] of chosen and rejected answers, in nats.

    The loss is -log sigmoid(chosen reward - rejected reward); a reward is beta times the log-ratio to the reference.
    """
    rewards = beta * (logprobs - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def fingerprint_pairs(pairs: Iterable[PreferenceExample], weights: str) -> str:
    """Hash what decides the reference's log-probabilities: ids and tiles of the pairs, and a hash of the weights."""
    digest = hashlib.sha256(weights.encode())
    for pair in pairs:
        for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, pair.tiles, pair.tile_sizes):
            digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
    return digest.hexdigest()[:16]
