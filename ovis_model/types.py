"""Shared data types: model input, sampling parameters, completion, the engine protocol."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# Placeholders: negative ids in the place of visual embeddings. The numbers are those of the original code
# (AIDC-AI/Ovis v2.0, `ovis/util/constants.py`).
IMAGE_ATOM_ID = -300  # one visual token; a tile has `VisionConfig.tokens_per_tile` of them
IMAGE_START_ID = -301
OVERVIEW_END_ID = -302  # after the first tile of an image
COLUMN_SEPARATOR_ID = -303
ROW_SEPARATOR_ID = -304
IMAGE_END_ID = -305

MAX_CONCURRENT_SEQUENCES = 128
"""Maximum number of requests that an engine decodes at once, if its memory allows. Its caller should keep this many
available."""

FinishReason = Literal["stop", "length"]


class Grid(NamedTuple):
    """How an image is cut: into `rows` x `cols` tiles, without the overview."""

    rows: int
    cols: int


@dataclass(frozen=True, eq=False)
class Request:
    """One model input.

    input_ids: int32[T]; text ids >= 0, placeholders < 0, already expanded: T is the true prompt length.
    tiles: uint8[N, 3, S, S]; each shows one crop of an image, centred; the border around it is ignored.
    tile_sizes: int32[N, 2]; (height_px, width_px) of the crop inside each tile.
    group: requests of one call with the same group, unless it is None, must have the same images. The engine computes
    once what they share; it raises ValueError if the images differ.
    """

    input_ids: NDArray[np.int32]
    tiles: NDArray[np.uint8]
    tile_sizes: NDArray[np.int32]
    group: Hashable = None


@dataclass(frozen=True)
class Constraint:
    """A rule for an answer: `spec` is a regular expression for the whole answer, or a JSON schema as JSON text.

    `grammar.guides.check` reports whether a constraint is supported.
    """

    kind: Literal["regex", "json_schema"]
    spec: str

    def __post_init__(self) -> None:
        _require(self.kind in ("regex", "json_schema"), "kind", self.kind, "'regex' or 'json_schema'")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the output tokens of one request.

    temperature 0 is greedy. top_p 1 and top_k 0 keep every token. repetition_penalty (CTRL, arXiv:1909.05858)
    applies to the tokens generated so far, not to the prompt: the original passes embeddings to `generate`, so its
    penalty never sees the prompt either. Samples of a request depend only on its `seed`; None draws one. Generation
    ends at an end-of-text id of the checkpoint, at a `stop` string or after `max_new_tokens`. With a `constraint`, an
    answer that ends before `max_new_tokens` satisfies it; one that is cut there is the beginning of such an answer.

    `choices` holds the token ids of each allowed answer, each ending with an end-of-text id. With it nothing is
    generated: one pass over the prompt's cache scores all of them. The answer is the most probable choice or, with a
    temperature, a draw by `seed` from softmax(log-likelihood / temperature). Of the other parameters, only `logprobs`
    is used.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = True
    choices: tuple[tuple[int, ...], ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        # Outside this range, scores divided by the temperature overflow float32 or are all equal.
        is_sound = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6
        _require(is_sound, "temperature", self.temperature, "0 (greedy) or from 1e-6 to 1e6")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "positive, 1 is off")
        _require("" not in self.stop, "stop", self.stop, "non-empty strings")
        _require(all(c and min(c) >= 0 for c in self.choices), "choices", self.choices, "non-empty, of token ids >= 0")
        _require(not (self.stop and self.constraint), "stop", self.stop, "empty: a constraint says where answers end")


@dataclass(frozen=True, eq=False)
class Completion:
    """One model output.

    output_ids: int32[T']; includes the end-of-text id if the model generated one, as in the original.
    mean_logprob: mean natural-log probability of `output_ids` in the model's own distribution, before penalty,
    temperature and truncation; NaN when `SamplingParams.logprobs` is off.
    choice_probs: float32[C]; softmax over the log-likelihoods of all `SamplingParams.choices`; None without choices.
    """

    output_ids: NDArray[np.int32]
    finish_reason: FinishReason
    mean_logprob: float
    choice_probs: NDArray[np.float32] | None = None


class RequestError(ValueError):
    """This request cannot be generated, but others can; its row becomes an error row."""


class ConstraintExhausted(RequestError):  # noqa: N818  (the name says what happened)
    """An answer cannot be continued within its constraint, but others can.

    `outcomes`: what became of each request of the call, if no request failed for another reason.
    """

    outcomes: Sequence[Completion | RequestError] = ()


class EngineDied(RuntimeError):  # noqa: N818  (the name says what happened)
    """The device is lost; the process that holds it must be replaced."""


class Engine(Protocol):
    """The interface between the pipeline and a model."""

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Return completions in the order of `requests`; several threads may call at once.

        Raise RequestError if one of the requests cannot be generated, EngineDied if the device is lost.
        """
        ...

    def rebuild(self) -> bool:
        """Try to restore the engine after EngineDied; return False if its process must be replaced."""
        ...

    def measure(self) -> dict[str, float]:
        """Return totals of its work since it was loaded or rebuilt: those of `calls.Stats`, or some of them."""
        ...


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} must be {rule}")
