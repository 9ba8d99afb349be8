"""What a request must satisfy: one that the model cannot take in would fail the requests in its pass as well."""

from __future__ import annotations

from dataclasses import dataclass

from ovis_model.config import OvisConfig
from ovis_model.engine.request_state import RequestState
from ovis_model.engine.scheduler import Budget
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_END_ID, Request, RequestError


@dataclass(frozen=True)
class RequestChecks:
    """The limits of a model and of the device that it is on."""

    config: OvisConfig
    budget: Budget
    has_tokenizer: bool

    def check(self, index: int, state: RequestState) -> None:
        """Raise RequestError naming `index` for a request that can never be generated, ValueError without tokenizer."""
        self._check_prompt(index, state.request)
        self._check_lengths(index, state)
        self._check_choices(index, state)
        if (state.params.stop or state.params.constraint) and not self.has_tokenizer:
            raise ValueError("stop strings and constraints need a tokenizer: give OvisEngine one")

    def _check_prompt(self, index: int, request: Request) -> None:
        ids, vocab_size = request.input_ids, self.config.language.vocab_size
        if not len(ids):
            raise RequestError(f"request {index}: the prompt is empty")
        if ids.max() >= vocab_size or ids.min() < IMAGE_END_ID:
            raise RequestError(
                f"request {index}: prompt ids from {ids.min()} to {ids.max()}; the model has {vocab_size}"
            )
        found, wanted = int((ids == IMAGE_ATOM_ID).sum()), len(request.tiles) * self.config.vision.tokens_per_tile
        if found != wanted:
            raise RequestError(f"request {index}: {found} placeholders for {wanted} visual tokens")

    def _check_lengths(self, index: int, state: RequestState) -> None:
        prompt, output = state.num_prompt_tokens, state.max_new_tokens
        limit = min(self.config.max_length, self.budget.kv_tokens)
        if prompt + output > limit:
            raise RequestError(
                f"request {index}: {prompt} prompt + {output} output tokens are {prompt + output - limit} over the "
                f"limit of {limit}"
            )
        tokens, what = (prompt + output, "prompt and choice") if state.params.choices else (prompt, "prompt")
        if tokens > self.budget.prompt_tokens:
            raise RequestError(
                f"request {index}: {tokens} {what} tokens are {tokens - self.budget.prompt_tokens} over the "
                f"{self.budget.prompt_tokens} that the device has memory for"
            )

    def _check_choices(self, index: int, state: RequestState) -> None:
        largest, vocab_size = max(map(max, state.params.choices), default=0), self.config.language.vocab_size
        if largest >= vocab_size:
            raise RequestError(f"request {index}: a choice holds token {largest}; the model has {vocab_size}")
        if state.params.choices and state.request.input_ids[-1] == IMAGE_ATOM_ID:
            raise RequestError(f"request {index}: the prompt ends within an image; choices must follow a text")
