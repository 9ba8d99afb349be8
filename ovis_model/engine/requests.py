"""Turn requests into completions: check them, keep what is generated, decide when it ends. Knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ovis_model.config import OvisConfig
from ovis_model.engine.prefix_sharing import Item, Prefix, find_prefixes
from ovis_model.engine.sampling import RandomStream
from ovis_model.tokenizer import cut_at_stop, detokenize
from ovis_model.types import (
    IMAGE_ATOM_ID,
    IMAGE_END_ID,
    Completion,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
)
from ovis_model.wording import count_nouns

if TYPE_CHECKING:
    from ovis_model.grammar.guides import Guide


@dataclass(eq=False)
class RequestState:
    """A request and what has been generated for it. `guide` computes which tokens its constraint allows next."""

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
        """Whether the request has finished or failed, so that it no longer needs its slot."""
        return self.finish_reason is not None or self.error is not None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt with expanded placeholders."""
        return len(self.request.input_ids)

    @property
    def item(self) -> Item:
        """The images of the request."""
        return self.prefix.item

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of output tokens: the longest choice, if there are choices."""
        return max(map(len, self.params.choices), default=self.params.max_new_tokens)

    @property
    def max_cached(self) -> int:
        """Maximum number of tokens in the cache; the last token and the tokens of choices are never cached."""
        return self.num_prompt_tokens + (0 if self.params.choices else self.params.max_new_tokens - 1)

    @property
    def num_cached(self) -> int:
        """Number of tokens in the cache before the newest one is added."""
        return self.num_prompt_tokens + len(self.output_ids) - 1

    def append(self, token_id: int, logprob: float) -> None:
        """Add a generated token and its log-probability."""
        self.output_ids.append(token_id)
        self.logprob_sum += logprob

    def choose(self, index: int, logliks: NDArray[np.float64]) -> None:
        """Finish with choice `index`, given the log-likelihoods float64[C] of all choices."""
        likelihoods = np.exp(logliks - logliks.max())
        self.choice_probs = (likelihoods / likelihoods.sum()).astype(np.float32)
        self.output_ids, self.logprob_sum = list(self.params.choices[index]), float(logliks[index])
        self.finish_reason = "stop"

    def restart(self) -> None:
        """Drop what has been generated, so that the request generates the same again."""
        self.stream = RandomStream(self.params.seed)
        self.output_ids, self.logprob_sum = [], 0.0

    def make_completion(self) -> Completion:
        """Return the completion. Raise RequestError if the request failed."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "a request left the engine unfinished"
        mean = self.logprob_sum / len(self.output_ids) if self.params.logprobs else math.nan
        return Completion(np.array(self.output_ids, dtype=np.int32), self.finish_reason, mean, self.choice_probs)


def make_states(requests: Sequence[Request], params: Sequence[SamplingParams]) -> list[RequestState]:
    """Return the initial state of each request of a call. Raise ValueError if images differ within a `group`."""
    return [
        RequestState(request, own, RandomStream(own.seed), prefix)
        for request, own, prefix in zip(requests, params, find_prefixes(requests), strict=True)
    ]


@dataclass(frozen=True)
class RequestChecks:
    """Limits of a model and of its device. A request beyond them would also fail the other requests in its pass."""

    config: OvisConfig
    max_tokens: int  # of prompt and output
    max_prompt_tokens: int
    has_tokenizer: bool

    def check(self, index: int, state: RequestState) -> None:
        """Raise RequestError that names `index` if the request can never be generated.

        Raise ValueError if it needs a tokenizer that is missing.
        """
        faults = chain(
            self._find_prompt_faults(state.request), self._find_length_faults(state), self._find_choice_faults(state)
        )
        if fault := next(faults, None):
            raise RequestError(f"request {index}: {fault}")
        if (state.params.stop or state.params.constraint) and not self.has_tokenizer:
            raise ValueError("stop strings and constraints need a tokenizer; pass tokenizer=... to OvisEngine")

    def _find_prompt_faults(self, request: Request) -> Iterator[str]:
        ids, vocab_size = request.input_ids, self.config.language.vocab_size
        if not len(ids):
            yield "the prompt is empty"
        if ids.max() >= vocab_size or ids.min() < IMAGE_END_ID:
            yield f"prompt ids range from {ids.min()} to {ids.max()}; the model has {vocab_size} ids"
        found, wanted = int((ids == IMAGE_ATOM_ID).sum()), len(request.tiles) * self.config.vision.tokens_per_tile
        if found != wanted:
            yield f"{count_nouns(found, 'placeholder')} for {count_nouns(wanted, 'visual token')}"

    def _find_length_faults(self, state: RequestState) -> Iterator[str]:
        prompt, output = state.num_prompt_tokens, state.max_new_tokens
        limit = min(self.config.max_length, self.max_tokens)
        if (excess := prompt + output - limit) > 0:
            yield f"{prompt} prompt + {output} output tokens are {excess} over the limit of {limit}"
        tokens, what = (prompt + output, "prompt and choice") if state.params.choices else (prompt, "prompt")
        limit = self.max_prompt_tokens
        if (excess := tokens - limit) > 0:
            yield f"{tokens} {what} tokens are {excess} over the {limit} that fit in the device's memory"

    def _find_choice_faults(self, state: RequestState) -> Iterator[str]:
        largest, vocab_size = max(map(max, state.params.choices), default=0), self.config.language.vocab_size
        if largest >= vocab_size:
            yield f"a choice contains token {largest}; the model has {vocab_size} ids"
        if state.params.choices and state.request.input_ids[-1] == IMAGE_ATOM_ID:
            yield "the prompt ends within an image; choices must follow text"


@dataclass(frozen=True)
class StopRule:
    """The rule that ends an answer: at an end-of-text id, at a stop string or at its maximum length."""

    eos_token_ids: Sequence[int]
    tokenizer: Tokenizer | None

    def find_finish_reason(self, state: RequestState) -> FinishReason | None:
        """Return why the newest token ends the answer, or None if it does not."""
        if state.output_ids[-1] in self.eos_token_ids or self._has_stop_string(state):
            return "stop"
        return "length" if len(state.output_ids) == state.params.max_new_tokens else None

    def _has_stop_string(self, state: RequestState) -> bool:
        return self.has_stop_string(state.output_ids, state.params.stop)

    def has_stop_string(self, output_ids: Sequence[int], stops: Sequence[str]) -> bool:
        """Return whether the newest token ends one of `stops`."""
        if not stops or self.tokenizer is None:
            return False
        # A character takes up to four byte tokens, so only this tail can contain a new stop string.
        text = detokenize(self.tokenizer, output_ids[-4 * (max(map(len, stops)) + 1) :])
        return cut_at_stop(text, stops) != text
