"""Logits -> the next token of every row, each row by its own parameters and its own random stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ovis_model.types import SamplingParams


class RandomStream:
    """A row's own random numbers; None draws a seed."""

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        return float(torch.rand(1, generator=self._generator))


class Sampler:
    """For rows that are generated side by side; made anew when one of them leaves or enters.

    Order of operations as in transformers: repetition penalty, temperature, top-k, top-p. A sampled row draws one
    number a step from its own stream on the CPU, so neighbours and device cannot change its sample.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        streams: Sequence[RandomStream],
        vocab_size: int,
        device: torch.device,
        output_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`output_ids`: what each row has generated before, for the penalty."""
        self._params, self._streams = params, streams
        self._sampled = [row for row, p in enumerate(params) if p.temperature > 0]
        self._wants_logprobs = any(p.logprobs for p in params)
        self._penalty = _column([p.repetition_penalty for p in params], device)
        self._seen: Tensor | None = None
        if any(p.repetition_penalty != 1 for p in params):
            self._seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for row, ids in enumerate(output_ids or ()):
                self._seen[row, list(ids)] = True

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B, vocab] -> ids int64[B] and their log-probabilities float32[B] under the unmodified logits."""
        raw = logits.float()
        scores = self._penalise(raw)
        ids = scores.argmax(-1)
        if self._sampled:
            ids[self._sampled] = self._draw(scores[self._sampled])
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        return ids, self._logprobs(raw, ids)

    def _penalise(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            return logits
        lowered = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return torch.where(self._seen, lowered, logits)

    def _draw(self, scores: Tensor) -> Tensor:
        params = [self._params[row] for row in self._sampled]
        probabilities = (scores / _column([p.temperature for p in params], scores.device)).softmax(-1)
        sorted_p, order = probabilities.sort(dim=-1, descending=True, stable=True)
        kept = _truncate(sorted_p, params)
        cumulative = kept.cumsum(-1)
        uniform = torch.tensor([self._streams[row].uniform() for row in self._sampled], device=scores.device)
        # `right`: a draw of exactly 0 must not choose a token of probability 0.
        at = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        return order.gather(1, at.clamp(max=_last_kept(kept))).squeeze(1)

    def _logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        if not self._wants_logprobs:
            return torch.full((len(ids),), math.nan)
        chosen = logits.gather(1, ids[:, None]).squeeze(1)
        return chosen - logits.logsumexp(-1)


def _truncate(sorted_p: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zero what top-k and then top-p leave out of descending probabilities [B, vocab]."""
    vocab_size = sorted_p.shape[1]
    top_k = _column([p.top_k or vocab_size for p in params], sorted_p.device)
    rank = torch.arange(vocab_size, device=sorted_p.device)
    kept = sorted_p.masked_fill(rank >= top_k, 0)
    top_p = _column([p.top_p for p in params], sorted_p.device)
    mass_before = kept.cumsum(-1) - kept
    return kept.masked_fill((mass_before >= top_p * kept.sum(-1, keepdim=True)) & (top_p < 1), 0)


def _last_kept(kept: Tensor) -> Tensor:
    return (kept > 0).sum(-1, keepdim=True).clamp(min=1) - 1


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None]
