"""Answers from a list of choices: each is scored after the prompt that is in the request's slot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

from ovis_model.engine.model_runner import ModelRunner
from ovis_model.engine.request_state import RequestState
from ovis_model.engine.sampling import Sampler
from ovis_model.engine.scheduler import Budget, Span, pack_passes
from ovis_model.types import SamplingParams


def answer_choices(runner: ModelRunner, prompts: Sequence[Span], budget: Budget) -> None:
    """Finish the requests that have choices."""
    choice_of = {span: choice for prompt in prompts for span, choice in _choice_spans(prompt)}
    logliks: dict[Span, float] = {}
    for group in pack_passes(choice_of, budget.prefill_tokens):
        logliks.update(zip(group, _score(runner, group, [choice_of[span] for span in group], budget), strict=True))
    of_states: dict[RequestState, list[float]] = {}
    for span in choice_of:
        of_states.setdefault(span.state, []).append(logliks[span])
    for state, index in zip(of_states, _draw(runner, of_states), strict=True):
        state.choose(index, np.array(of_states[state]))


def _choice_spans(prompt: Span) -> Iterator[tuple[Span, tuple[int, ...]]]:
    """Yield each choice of a request, with the tokens after which its own are predicted."""
    ids, slot = prompt.state.request.input_ids, prompt.target
    assert slot is not None, "a prompt is in no slot"
    for choice in prompt.state.params.choices:
        yield Span(prompt.state, np.array([ids[-1], *choice[:-1]], np.int32), len(ids) - 1, slot), choice


def _score(runner: ModelRunner, group: list[Span], choices: Sequence[Sequence[int]], budget: Budget) -> list[float]:
    """Return natural-log likelihoods of `choices`, whose tokens but the last end the spans of `group`."""
    hidden = runner.run_spans(group)
    places = [(index, place) for index, choice in enumerate(choices) for place in range(len(choice))]
    ids, losses = list(chain.from_iterable(choices)), []
    for part in (slice(start, start + budget.slots) for start in range(0, len(ids), budget.slots)):
        logits = runner.logits_at(hidden, places[part]).float()
        losses.append(F.cross_entropy(logits, runner.to_tensor(ids[part]), reduction="none"))
    each = iter(torch.cat(losses).tolist())
    return [-sum(islice(each, len(choice))) for choice in choices]


def _draw(runner: ModelRunner, logliks: dict[RequestState, list[float]]) -> list[int]:
    """Return the choice that each request takes, by its own random stream if it has a temperature."""
    if not logliks:
        return []
    params = [SamplingParams(temperature=state.params.temperature, logprobs=False) for state in logliks]
    scores = pad_sequence([torch.tensor(each) for each in logliks.values()], True, -math.inf)
    sampler = Sampler(params, [state.stream for state in logliks], scores.shape[1], scores.device)
    ids: list[int] = runner.agree(sampler(scores)).ids.tolist()
    return ids
