"""Which rows hold a slot of the cache, which wait, and what runs next.

Knows lengths and budgets, not tensors: nothing here touches the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from ovis_model.constraints import Guide
from ovis_model.sampling import RandomStream
from ovis_model.types import ROWS_SIDE_BY_SIDE, Completion, FinishReason, Request, RequestError, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the device may hold at once, so that the largest pass fits by construction."""

    kv_tokens: int  # slots x capacity of the cache
    slots: int = ROWS_SIDE_BY_SIDE  # rows that decode side by side at most
    slot_tokens: int = 0  # room of a slot at least, where memory that rows do not use serves nobody else
    prefill_tokens: int = 8192  # of one pass of several rows, padding included
    prompt_tokens: int = 32768  # of one row, which may be a pass of its own
    vision_tiles: int = 16  # of one pass; a tile of a published size takes about 0.1 GB in the visual head


@dataclass(eq=False)
class Row:
    """A request on its way to a completion. `visual` holds its visual embeddings once they are computed.

    `guide` knows what its constraint lets follow `output_ids`.
    """

    request: Request
    params: SamplingParams
    stream: RandomStream
    guide: Guide | None = None
    visual: Any = None
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
    def max_tokens(self) -> int:
        """Places in the cache that it may need: the last token is never attended to."""
        return self.num_prompt_tokens + self.params.max_new_tokens - 1

    @property
    def num_cached(self) -> int:
        """Tokens in the cache before the newest is put there."""
        return self.num_prompt_tokens + len(self.output_ids) - 1

    def append(self, token_id: int, logprob: float) -> None:
        self.output_ids.append(token_id)
        self.logprob_sum += logprob

    def restart(self) -> None:
        self.stream = RandomStream(self.params.seed)
        self.output_ids, self.logprob_sum = [], 0.0

    def completion(self) -> Completion:
        """Raises RequestError if the row failed."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "a row left the engine unfinished"
        mean = self.logprob_sum / len(self.output_ids) if self.params.logprobs else math.nan
        return Completion(np.array(self.output_ids, dtype=np.int32), self.finish_reason, mean)


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

    def plan_cache(self) -> bool:
        """Size the cache for the rows at hand -> whether it must be allocated anew; only between rows.

        All slots with room for twice the longest row at hand, so that most rows to come fit too; fewer if there is no
        memory for it. A row that needs more is let in when all others have left. With one slot there is no reason to
        make it longer than the next row needs.
        """
        if self.running or not self.waiting:
            return False
        at_hand = self.waiting if self.budget.slots > 1 else [self.waiting[0]]
        longest = max(row.max_tokens for row in at_hand)
        capacity = -(-longest // 64) * 64
        if self.budget.slots > 1:
            share = self.budget.kv_tokens // self.budget.slots // 64 * 64
            capacity = max(capacity, min(max(2 * capacity, self.budget.slot_tokens), share))
        capacity = min(capacity, self.budget.kv_tokens)
        slots = max(1, min(self.budget.slots, self.budget.kv_tokens // capacity))
        if self.waiting[0].max_tokens <= self.capacity and slots <= self.slots:
            return False
        self.capacity, self.slots = capacity, slots
        return True

    def admit(self) -> dict[int, Row]:
        """The next waiting rows by the slot that they take: those of finished rows first."""
        finished = [slot for slot, row in enumerate(self.running) if row.has_left]
        admitted = {}
        for slot in chain(finished, range(len(self.running), self.slots)):
            if not self.waiting or self.waiting[0].max_tokens > self.capacity:
                break
            admitted[slot] = self.waiting.popleft()
            self.running[slot : slot + 1] = [admitted[slot]]
        return admitted

    def retire(self) -> list[Move]:
        """Finished rows whose slots nobody took leave; the last rows move into the gaps."""
        moves = []
        for slot in reversed(range(len(self.running))):
            if self.running[slot].has_left:
                last = self.running.pop()
                if slot < len(self.running):
                    self.running[slot] = last
                    moves.append(Move(len(self.running), slot, last.num_cached))
        return moves

    def restart_all(self) -> None:
        """Running rows wait again, in their order, before all others; those that have left do not."""
        for row in reversed(self.running):
            if not row.has_left:
                row.restart()
                self.waiting.appendleft(row)
        self.running.clear()
        self.slots = self.capacity = 0


def prefill_groups(rows: Sequence[Row], max_tokens: int, *, least_fill: float = 0.8) -> Iterable[list[Row]]:
    """Rows of like length, so that little of a pass is padding; at most `max_tokens` a pass, or one row."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.num_prompt_tokens):
        width = group[0].num_prompt_tokens if group else 0
        if group and (width * (len(group) + 1) > max_tokens or row.num_prompt_tokens < least_fill * width):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
