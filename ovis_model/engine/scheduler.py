"""Which rows hold a slot of the cache, which wait, and what runs next.

Knows lengths and budgets, not tensors: nothing here touches the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ovis_model.engine.prefix_sharing import Item, Prefix, prefixes_of
from ovis_model.engine.sampling import RandomStream
from ovis_model.grammar.guides import Guide
from ovis_model.types import ROWS_SIDE_BY_SIDE, Completion, FinishReason, Request, RequestError, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the device may hold at once, so that the largest pass fits by construction."""

    kv_tokens: int  # slots x capacity of the cache
    slots: int = ROWS_SIDE_BY_SIDE  # rows that decode side by side at most
    slot_tokens: int = 0  # room of a slot at least, where memory that rows do not use serves nobody else
    prefill_tokens: int = 8192  # of one pass of several rows, padding and `CACHED_PER_TOKEN` included
    prompt_tokens: int = 32768  # of one row, which may be a pass of its own
    vision_tiles: int = 16  # of one pass; a tile of a published size takes about 0.1 GB in the visual head


CACHED_PER_TOKEN = 24
"""Tokens in the cache that count as one in a pass that goes on after them: it copies their keys and values, layer by
layer, which takes no more memory than that in any published size (`tests/test_memory.py`)."""


@dataclass(eq=False)
class Row:
    """A request on its way to a completion. `guide` knows what its constraint lets follow `output_ids`."""

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
        """Finished or failed: it needs its slot no more."""
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
    def max_tokens(self) -> int:
        """Places in the cache that it may need: the last token is never attended to, and choices are not put there."""
        return self.num_prompt_tokens + (0 if self.params.choices else self.params.max_new_tokens - 1)

    @property
    def num_cached(self) -> int:
        """Tokens in the cache before the newest is put there."""
        return self.num_prompt_tokens + len(self.output_ids) - 1

    def append(self, token_id: int, logprob: float) -> None:
        self.output_ids.append(token_id)
        self.logprob_sum += logprob

    def choose(self, index: int, logliks: NDArray[np.float64]) -> None:
        """Answer with choice number `index`; `logliks`: the log-likelihoods [C] of all."""
        likelihoods = np.exp(logliks - logliks.max())
        self.choice_probs = (likelihoods / likelihoods.sum()).astype(np.float32)
        self.output_ids, self.logprob_sum = list(self.params.choices[index]), float(logliks[index])
        self.finish_reason = "stop"

    def restart(self) -> None:
        self.stream = RandomStream(self.params.seed)
        self.output_ids, self.logprob_sum = [], 0.0

    def completion(self) -> Completion:
        """Raises RequestError if the row failed."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "a row left the engine unfinished"
        mean = self.logprob_sum / len(self.output_ids) if self.params.logprobs else math.nan
        return Completion(np.array(self.output_ids, dtype=np.int32), self.finish_reason, mean, self.choice_probs)


def rows_of(requests: Sequence[Request], params: Sequence[SamplingParams]) -> list[Row]:
    """Of one call: see `siblings`."""
    return [
        Row(request, own, RandomStream(own.seed), prefix)
        for request, own, prefix in zip(requests, params, prefixes_of(requests), strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens `ids` of a row, to be computed at once: they follow the first `start` tokens of slot `source`.

    They and what they follow are kept in slot `target`, if there is one.
    """

    row: Row
    ids: NDArray[np.int32]
    start: int
    source: int
    target: int | None = None


@dataclass(frozen=True)
class Move:
    """The row in slot `source` goes on in slot `target`, with `length` tokens in the cache."""

    source: int
    target: int
    length: int


class Scheduler:
    """`running[i]` holds slot i: the slots in use are the first ones, without a gap."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.slots = self.capacity = 0
        self._held: list[Prefix] = []  # what each slot in use begins with

    def enqueue(self, rows: Iterable[Row]) -> None:
        """Siblings wait next to each other, so that they enter together."""
        siblings: dict[Item, list[Row]] = {}
        for row in rows:
            siblings.setdefault(row.item, []).append(row)
        self.waiting.extend(chain.from_iterable(siblings.values()))

    def plan_cache(self) -> bool:
        """Size the cache for the rows at hand -> whether it must be allocated anew; only between rows.

        All slots with room for twice the longest row at hand, so that most rows to come fit too; fewer if there is no
        memory for it. A row that needs more is let in when all others have left. With one slot there is no reason to
        make it longer than the next row and its siblings need.
        """
        if self.running or not self.waiting:
            return False
        first = self.waiting[0]
        at_hand = [row for row in self.waiting if self.budget.slots > 1 or row.prefix is first.prefix]
        longest = max(row.max_tokens for row in at_hand)
        capacity = -(-longest // 64) * 64
        if self.budget.slots > 1:
            share = self.budget.kv_tokens // self.budget.slots // 64 * 64
            capacity = max(capacity, min(max(2 * capacity, self.budget.slot_tokens), share))
        capacity = min(capacity, self.budget.kv_tokens)
        slots = max(1, min(self.budget.slots, self.budget.kv_tokens // capacity))
        if first.max_tokens <= self.capacity and slots <= self.slots:
            return False
        self.capacity, self.slots = capacity, slots
        return True

    def admit(self) -> list[Row]:
        """Let the next waiting rows in: into slots of finished rows first, if one can be had into one of a sibling."""
        free = [slot for slot, row in enumerate(self.running) if row.has_left]
        free += range(len(self.running), self.slots)
        admitted: list[Row] = []
        while self.waiting and len(admitted) < len(free) and self.waiting[0].max_tokens <= self.capacity:
            admitted.append(self.waiting.popleft())
        others = [row for row in admitted if not self._enter_after_sibling(row, free)]
        for slot, row in zip(free, others, strict=False):
            self.running[slot : slot + 1] = [row]
            self._held[slot : slot + 1] = [Prefix(row.item, 0)]
        return admitted

    def _enter_after_sibling(self, row: Row, free: list[int]) -> bool:
        """What the slot begins with is kept: it may be the last one that does so."""
        for slot in free:
            if slot < len(self._held) and self._held[slot] is row.prefix:
                self.running[slot] = row
                free.remove(slot)
                return True
        return False

    def retire(self) -> list[Move]:
        """Finished rows whose slots nobody took leave; the last rows move into the gaps."""
        moves = []
        for slot in reversed(range(len(self.running))):
            if self.running[slot].has_left:
                last, held = self.running.pop(), self._held.pop()
                if slot < len(self.running):
                    self.running[slot], self._held[slot] = last, held
                    moves.append(Move(len(self.running), slot, last.num_cached))
        return moves

    def prompts(self, admitted: Iterable[Row]) -> tuple[list[Span], list[Span]]:
        """What is to be computed of the prompts of rows let in: whole ones, then what follows a prefix in a slot.

        To be asked when all moves are done; a prefix may be that of a whole prompt.
        """
        slots = {row: slot for slot, row in enumerate(self.running)}
        held = {prefix: slot for slot, prefix in enumerate(self._held)}
        whole, rest = [], []
        for row in admitted:
            slot, start, ids = slots[row], row.prefix.length, row.request.input_ids
            if start and row.prefix in held:
                rest.append(Span(row, ids[start:], start, held[row.prefix], slot))
            else:
                whole.append(Span(row, ids, 0, slot, slot))
                held[row.prefix] = slot
            self._held[slot] = row.prefix
        return whole, rest

    @property
    def next_is_sibling(self) -> bool:
        """Only rows that have left hold what the next one begins with: it should enter before a step loses that."""
        going_on = {prefix for row, prefix in zip(self.running, self._held, strict=True) if not row.has_left}
        return bool(self.waiting) and self.waiting[0].prefix in set(self._held) - going_on

    def restart_all(self) -> None:
        """Running rows wait again, in their order, before all others; those that have left do not."""
        for row in reversed(self.running):
            if not row.has_left:
                row.restart()
                self.waiting.appendleft(row)
        self.running.clear()
        self._held.clear()
        self.slots = self.capacity = 0


def after_prompt(prompt: Span) -> Iterator[tuple[Span, tuple[int, ...]]]:
    """For each choice of a row whose prompt is in its slot, the tokens that its own come after, and the choice."""
    ids, slot = prompt.row.request.input_ids, prompt.target
    assert slot is not None, "a prompt is in no slot"
    for choice in prompt.row.params.choices:
        yield Span(prompt.row, np.array([ids[-1], *choice[:-1]], np.int32), len(ids) - 1, slot), choice


def passes(spans: Iterable[Span], max_tokens: int) -> Iterator[list[Span]]:
    """Spans of like length, longest first; padded by a fifth or 32 tokens, which cost less than one more pass.

    At most `max_tokens` a pass, or one span.
    """
    group: list[Span] = []
    for span in sorted(spans, key=lambda span: -len(span.ids)):
        if group and not _fits(span, group, max_tokens):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _fits(span: Span, group: Sequence[Span], max_tokens: int) -> bool:
    width, cached = len(group[0].ids), max(span.start, *(other.start for other in group))
    tokens = (len(group) + 1) * (width + cached // CACHED_PER_TOKEN)
    return tokens <= max_tokens and width - len(span.ids) <= max(width // 5, 32)
