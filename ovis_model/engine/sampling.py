"""Sample the next token of each request with its own parameters and random stream."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovis_model.network.uploads import upload
from ovis_model.types import SamplingParams


class RandomStream:
    """The random keys of one request, one per step; None as seed draws a seed."""

    def __init__(self, seed: int | None) -> None:
        self._seed = secrets.randbits(63) if seed is None else seed
        self._step = 0

    def draw_key(self) -> int:
        """Return the next key: 63 bits that depend only on the seed and the step."""
        digest = hashlib.blake2b(f"{self._seed} {self._step}".encode(), digest_size=8).digest()
        self._step += 1
        return int.from_bytes(digest) >> 1


class Choice(NamedTuple):
    """The next token of each request: ids int64[B] and log-probabilities float32[B] under the unmodified logits."""

    ids: Tensor
    logprobs: Tensor


def choose_greedily(logits: Tensor) -> Choice:
    """Choose the token with the largest logit: [B, vocab_size] -> Choice."""
    raw = logits.float()
    ids = raw.argmax(-1)
    return Choice(ids, _gather_logprobs(raw, ids))


def _gather_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(-1)


class Sampler:
    """A sampler for the requests of one batch; a new one is made whenever a request enters or leaves.

    The order of operations is that of transformers: constraint, repetition penalty, temperature, top-k, top-p. A sample
    is the token with the largest score plus Gumbel noise. The noise of a token is a hash of the token and of the
    request's key. So the other requests of a batch cannot change a sample, and the last bits of a logit can only if two
    tokens almost tie.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        streams: Sequence[RandomStream],
        vocab_size: int,
        device: torch.device,
        output_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Take the tokens that each request has generated so far as `output_ids`, for the penalty."""
        self._streams = [stream for stream, p in zip(streams, params, strict=True) if p.temperature > 0]
        self._has_constraints = any(p.constraint for p in params)
        self._wants_logprobs = any(p.logprobs for p in params)
        self._truncates = any(p.temperature > 0 and (p.top_p < 1 or p.top_k > 0) for p in params)
        self._device = device
        self._seen: Tensor | None = None
        has_penalty = any(p.repetition_penalty != 1 for p in params)
        if self._streams or self._has_constraints or has_penalty:
            self._columns, seen = _upload_columns(params, vocab_size, device, output_ids or ())
            if has_penalty:
                self._seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
                self._seen[tuple(seen)] = True

    @property
    def is_greedy(self) -> bool:
        """Whether all requests choose as `choose_greedily`."""
        return not self._streams and self._seen is None and not self._has_constraints

    def __call__(self, logits: Tensor, masks: Future[NDArray[np.uint8]] | None = None) -> Choice:
        """Choose a token per request: [B, vocab_size] -> Choice.

        `masks` are those of `Guides.masks`, for the requests with a constraint.
        """
        raw = logits.float()
        keys, allowed = self._upload_keys(masks)
        scores = self._apply_penalty(raw if masks is None else self._apply_masks(raw, allowed))
        ids = scores.argmax(-1)
        if self._streams:
            ids[self._columns.sampled] = self._draw(scores[self._columns.sampled], keys)
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        return Choice(ids, _gather_logprobs(raw, ids) if self._wants_logprobs else torch.full_like(raw[:, 0], math.nan))

    def _upload_keys(self, masks: Future[NDArray[np.uint8]] | None) -> Sequence[Tensor]:
        """Draw the keys of this step, wait for its masks, and copy both to the device."""
        keys = np.array([stream.draw_key() for stream in self._streams], np.int64)
        bits = np.empty((0, 0), np.uint8) if masks is None else masks.result()
        return upload(self._device, keys, bits) if keys.size or bits.size else (torch.empty(0), torch.empty(0))

    def _apply_masks(self, logits: Tensor, masks: Tensor) -> Tensor:
        allowed = torch.ones_like(logits, dtype=torch.bool)
        allowed[self._columns.constrained] = unpack_masks(masks, logits.shape[1])
        return torch.where(allowed, logits, -math.inf)

    def _apply_penalty(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            return logits
        penalty = self._columns.penalty
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(self._seen, lowered, logits)

    def _draw(self, scores: Tensor, keys: Tensor) -> Tensor:
        scores = scores / self._columns.temperature
        noise = make_gumbel_noise(keys, scores.shape[1])
        if not self._truncates:
            return (scores + noise).argmax(-1)
        probabilities, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        kept = _truncate(probabilities, self._columns.top_k, self._columns.top_p)
        best = (kept.log() + noise.gather(1, order)).argmax(-1, keepdim=True)
        return order.gather(1, best).squeeze(1)


class _Columns(NamedTuple):
    """Parameters on the device: row numbers of the S sampled and the constrained requests, and columns of values."""

    sampled: Tensor  # int64[S]
    constrained: Tensor  # int64[C]
    temperature: Tensor  # float32[S, 1]
    top_k: Tensor  # int64[S, 1]; vocab_size keeps every token
    top_p: Tensor  # float32[S, 1]
    penalty: Tensor  # float32[B, 1]


def _upload_columns(
    params: Sequence[SamplingParams], vocab_size: int, device: torch.device, output_ids: Sequence[Sequence[int]]
) -> tuple[_Columns, list[Tensor]]:
    """Return the columns, and rows and ids of the tokens generated so far, int64[n] each."""
    sampled = [p for p in params if p.temperature > 0]
    arrays = (
        np.array([row for row, p in enumerate(params) if p.temperature > 0], np.int64),
        np.array([row for row, p in enumerate(params) if p.constraint], np.int64),
        np.array([[p.temperature] for p in sampled], np.float32),
        np.array([[p.top_k or vocab_size] for p in sampled], np.int64),
        np.array([[p.top_p] for p in sampled], np.float32),
        np.array([[p.repetition_penalty] for p in params], np.float32),
        np.array([row for row, ids in enumerate(output_ids) for _ in ids], np.int64),
        np.array([token for ids in output_ids for token in ids], np.int64),
    )
    *columns, rows, ids = upload(device, *arrays)
    return _Columns(*columns), [rows, ids]


def _truncate(sorted_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero what top-k and then top-p exclude from descending probabilities [B, vocab_size]."""
    rank = torch.arange(sorted_p.shape[1], device=sorted_p.device)
    kept = sorted_p.masked_fill(rank >= top_k, 0)
    mass_before = kept.cumsum(-1) - kept
    return kept.masked_fill((mass_before >= top_p * kept.sum(-1, keepdim=True)) & (top_p < 1), 0)


def unpack_masks(masks: Tensor, vocab_size: int) -> Tensor:
    """Unpack bits, the lowest first: uint8[B, bytes] -> bool[B, vocab_size]."""
    bits = _load_bits(masks.device).index_select(0, masks.flatten().int())
    return bits.view(torch.bool).view(len(masks), -1)[:, :vocab_size]


@cache
def _load_bits(device: torch.device) -> Tensor:
    """Return int64[256]: the eight bits of each byte as eight bytes, so that one lookup unpacks a byte."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little").view(np.int64)
    return torch.from_numpy(bits).to(device)


def make_gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Make noise float64[B, vocab_size] of the standard Gumbel distribution, from keys int64[B].

    It is computed from uniform numbers: SplitMix64 of key and token (Steele, Lea, Flood: Fast Splittable Pseudorandom
    Number Generators, 2014). Those are integers, so they are the same on every device.
    """
    x = keys[:, None] + torch.arange(1, vocab_size + 1, device=keys.device) * _to_signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _to_signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _to_signed(0x94D049BB133111EB)
    uniform = (_shift_right(x ^ _shift_right(x, 31), 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift would repeat the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _to_signed(constant: int) -> int:
    return constant - (1 << 64)
