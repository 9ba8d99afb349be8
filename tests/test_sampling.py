"""Sampling agrees with transformers' processors; each row has its own stream of random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ovis_model.engine.sampling import RandomStream, Sampler
from ovis_model.types import SamplingParams

CPU = torch.device("cpu")
VOCAB = 23
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 3


def make_sampler(params: list[SamplingParams]) -> Sampler:
    return Sampler(params, [RandomStream(p.seed) for p in params], VOCAB, CPU)


def compute_peer_probabilities(params: SamplingParams, seen: list[int]) -> Tensor:
    """Return the probabilities [VOCAB] from which transformers would sample after the tokens `seen`."""
    processors = pytest.importorskip("transformers").generation.logits_process
    chain = [processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    chain += [processors.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chain += [processors.TopKLogitsWarper(params.top_k)]
    if params.top_p < 1:
        chain += [processors.TopPLogitsWarper(params.top_p)]
    scores = LOGITS[None].clone()
    for process in chain:
        scores = process(torch.tensor([seen]), scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.05},
        {"top_k": 7, "top_p": 0.9, "temperature": 2.0},
        {"repetition_penalty": 1.7},
    ],
)
def test_frequencies_match_the_probabilities_of_transformers(options: dict[str, float]) -> None:
    num_rows = 4000
    params = [SamplingParams(**{"temperature": 1.0, **options}, seed=seed) for seed in range(num_rows)]  # type: ignore[arg-type]
    sampler = make_sampler(params)
    first = int(LOGITS.argmax())
    forced = torch.full((num_rows, VOCAB), -1e9)
    forced[:, first] = 0
    assert set(sampler(forced)[0].tolist()) == {first}  # so that every row has seen this token
    ids, logprobs = sampler(LOGITS.expand(num_rows, -1))
    wanted = compute_peer_probabilities(params[0], [first])
    seen = torch.bincount(ids, minlength=VOCAB) / num_rows
    assert set(seen.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
    assert (seen - wanted).abs().max() < 4 * math.sqrt(0.25 / num_rows)
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[ids])


def test_greedy_is_the_argmax_after_the_penalty() -> None:
    sampler = make_sampler([SamplingParams(repetition_penalty=1e6), SamplingParams()])
    logits = LOGITS.clamp(min=0.1).expand(2, -1)
    order = LOGITS.argsort(descending=True).tolist()
    assert [sampler(logits)[0].tolist() for _ in range(3)] == [[order[i], order[0]] for i in range(3)]


def test_the_samples_of_a_row_do_not_depend_on_its_batch() -> None:
    rows = [SamplingParams(temperature=1.0, seed=seed) for seed in range(6)]

    def draw(params: list[SamplingParams]) -> list[list[int]]:
        sampler = make_sampler(params)
        steps = [sampler(LOGITS.expand(len(params), -1))[0].tolist() for _ in range(8)]
        return [list(row) for row in zip(*steps, strict=True)]

    together = draw(rows)
    assert [draw([row])[0] for row in rows] == together
    assert draw([SamplingParams(), *rows[::-1]])[1:] == together[::-1]
    assert len(set(map(tuple, together))) == 6


def test_unseeded_rows_differ_from_run_to_run() -> None:
    params = [SamplingParams(temperature=1.0)] * 40
    first, second = (make_sampler(params)(LOGITS.expand(40, -1))[0].tolist() for _ in range(2))
    assert first != second


def test_logprobs_can_be_disabled() -> None:
    assert make_sampler([SamplingParams(logprobs=False)])(LOGITS[None])[1].isnan().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1),
        ("temperature", 1e-39),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop", ("",)),
    ],
)
def test_impossible_parameters_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
