"""Requests on their way to completions. Knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ovis_model.engine.prefix_sharing import Item, Prefix, find_prefixes
from ovis_model.engine.sampling import RandomStream
from ovis_model.grammar.guides import Guide
from ovis_model.types import Completion, FinishReason, Request, RequestError, SamplingParams


@dataclass(eq=False)
class RequestState:
    """A request and what has been generated for it. `guide` knows which tokens its constraint allows next."""

    request: Request
    params: SamplingParams
    stream: RandomStream
    prefix: Prefix
    guide: Guide | None = None
    choice_probs: NDArray[np.float32] | None = None
    output_ids: list[int] = field(default_factory=list)
    logprob_sum: float = 0.0
    finish_reason: FinishReason | None = None
    error: RequestError | None = None

    @property
    def has_left(self) -> bool:
        """Whether it has finished or failed, and so no longer needs its slot."""
        return self.finish_reason is not None or self.error is not None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.input_ids)

    @property
    def item(self) -> Item:
        return self.prefix.item

    @property
    def max_new_tokens(self) -> int:
        return max(map(len, self.params.choices), default=self.params.max_new_tokens)

    @property
    def max_cached(self) -> int:
        """Maximum number of tokens in the cache: the last token and those of choices are never put there."""
        return self.num_prompt_tokens + (0 if self.params.choices else self.params.max_new_tokens - 1)

    @property
    def num_cached(self) -> int:
        """Tokens in the cache before the newest is put there."""
        return self.num_prompt_tokens + len(self.output_ids) - 1

    def append(self, token_id: int, logprob: float) -> None:
        self.output_ids.append(token_id)
        self.logprob_sum += logprob

    def choose(self, index: int, logliks: NDArray[np.float64]) -> None:
        """Answer with choice number `index`, given the log-likelihoods [C] of all choices."""
        likelihoods = np.exp(logliks - logliks.max())
        self.choice_probs = (likelihoods / likelihoods.sum()).astype(np.float32)
        self.output_ids, self.logprob_sum = list(self.params.choices[index]), float(logliks[index])
        self.finish_reason = "stop"

    def restart(self) -> None:
        self.stream = RandomStream(self.params.seed)
        self.output_ids, self.logprob_sum = [], 0.0

    def completion(self) -> Completion:
        """Return the completion. Raise RequestError if the request failed."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "a request left the engine unfinished"
        mean = self.logprob_sum / len(self.output_ids) if self.params.logprobs else math.nan
        return Completion(np.array(self.output_ids, dtype=np.int32), self.finish_reason, mean, self.choice_probs)


def make_states(requests: Sequence[Request], params: Sequence[SamplingParams]) -> list[RequestState]:
    """Return the initial state of each request of one call. Raise ValueError for a broken `group`."""
    return [
        RequestState(request, own, RandomStream(own.seed), prefix)
        for request, own, prefix in zip(requests, params, find_prefixes(requests), strict=True)
    ]
