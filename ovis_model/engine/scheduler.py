"""Decide which requests have a slot of the cache, which wait, and what runs next.

Knows lengths and budgets, not tensors; it never accesses the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from ovis_model.engine.prefix_sharing import Item, Prefix
from ovis_model.engine.requests import RequestState
from ovis_model.types import MAX_CONCURRENT_SEQUENCES


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits for what the device processes at once, so that the largest pass fits by construction."""

    kv_tokens: int  # slots x capacity of the cache, or pages x page_tokens
    slots: int = MAX_CONCURRENT_SEQUENCES  # requests that decode at once
    slot_tokens: int = 0  # minimum capacity of a slot, used where spare memory has no other use
    page_tokens: int = 0  # a request gets as many pages of this size as it needs; 0: a slot of one capacity for all
    prefill_tokens: int = 8192  # per pass of several requests, including padding and `CACHED_PER_TOKEN`
    min_prefill_tokens: int = 0  # short prompts wait until a pass has so many; 0: each enters at once
    prompt_tokens: int = 32768  # of one request, which may be the only one of a pass
    max_tokens: int = 32768  # of prompt and output of one request
    vision_tiles: int = 16  # per pass; a tile of a published size takes about 0.1 GB in the visual head


CACHED_PER_TOKEN = 24
"""Number of cached tokens that count as one new token in a pass that extends them. The pass copies their keys and
values layer by layer, which takes at most the memory of one new token in all published sizes
(`tests/test_memory.py`)."""


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens `ids` of a request to compute at once, after the first `start` tokens of slot `source`.

    If `target` is given, both are kept in that slot.
    """

    state: RequestState
    ids: NDArray[np.int32]
    start: int
    source: int
    target: int | None = None

    @property
    def is_whole_prompt(self) -> bool:
        """Whether nothing is cached before these tokens, and they are kept."""
        return not self.start and self.target is not None


@dataclass(frozen=True)
class Move:
    """The request in slot `source` continues in slot `target`, with `length` tokens in the cache."""

    source: int
    target: int
    length: int


class Pages:
    """Which pages of a paged cache belong to which slot.

    `table` is int32[slots, pages of the longest request]. Page 0 belongs to no slot and fills unused entries.
    """

    def __init__(self, count: int, page_tokens: int, *, slots: int, max_tokens: int) -> None:
        self.count, self.page_tokens = count, page_tokens
        self.table = np.zeros((slots, -(-max_tokens // page_tokens)), np.int32)
        self.has_changed = False  # since the table was last read by `Scheduler.read_table`
        self._free = list(range(count, 0, -1))
        self._used = [0] * slots

    def count_available(self, leaving: Iterable[int] = ()) -> int:
        """Return the number of free pages, including those of the slots that are `leaving`."""
        return len(self._free) + sum(self._used[slot] for slot in leaving)

    def count_needed(self, tokens: int) -> int:
        """Return the number of pages of so many tokens."""
        return -(-tokens // self.page_tokens)

    def resize(self, tokens_of: Mapping[int, int]) -> None:
        """Give each slot pages for so many tokens in total, or take away what it has in excess, at its end."""
        growth = {slot: self.count_needed(tokens) - self._used[slot] for slot, tokens in tokens_of.items()}
        for slot in sorted(growth, key=lambda slot: growth[slot]):  # what shrinks frees pages for what grows
            self._grow(slot, growth[slot])
        self.has_changed = True

    def _grow(self, slot: int, count: int) -> None:
        used, row = self._used[slot], self.table[slot]
        for place in reversed(range(used + count, used)):
            self._free.append(int(row[place]))
            row[place] = 0
        for place in range(used, used + count):
            row[place] = self._free.pop()
        self._used[slot] += count

    def move(self, source: int, target: int) -> None:
        """Give the pages of one slot to another, which has none."""
        self.table[target], self._used[target] = self.table[source], self._used[source]
        self.table[source], self._used[source] = 0, 0
        self.has_changed = True


class Scheduler:
    """The queue and the slots. Slot i belongs to `running[i]`, so the first slots are in use, without a gap."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []
        self.slots = self.capacity = 0
        self.pages: Pages | None = None
        self._held: list[Prefix] = []  # what each slot in use begins with

    def enqueue(self, states: Iterable[RequestState]) -> None:
        """Append requests to the queue, with siblings next to each other so that they enter together."""
        siblings: dict[Item, list[RequestState]] = {}
        for state in states:
            siblings.setdefault(state.item, []).append(state)
        self.waiting.extend(chain.from_iterable(siblings.values()))

    def plan_cache(self) -> bool:
        """Size the cache for the waiting requests; return whether it must be reallocated.

        The size changes only while nothing runs. Pages are allocated once. All slots of one capacity have room for
        twice the longest of the next requests, so that most later requests fit too; if memory is short, there are fewer
        slots. A request that needs more waits until all others have left. A single slot is only as long as the next
        request and its siblings need.
        """
        if self.running or not self.waiting:
            return False
        if self.budget.page_tokens:
            return self._plan_pages()
        slots, capacity = self._size_slots()
        if self.waiting[0].max_cached <= self.capacity and slots <= self.slots:
            return False
        self.capacity, self.slots = capacity, slots
        return True

    def _plan_pages(self) -> bool:
        budget, longest = self.budget, self.waiting[0].max_cached
        if self.pages and longest <= self.capacity:
            return False
        count = max(budget.kv_tokens // budget.page_tokens, -(-longest // budget.page_tokens))
        self.slots, self.capacity = min(budget.slots, count), min(count * budget.page_tokens, budget.max_tokens)
        self.pages = Pages(count, budget.page_tokens, slots=self.slots, max_tokens=self.capacity)
        self.capacity = self.pages.table.shape[1] * budget.page_tokens
        return True

    def _size_slots(self) -> tuple[int, int]:
        """Return the number and the capacity of slots of one capacity that suit the next requests."""
        first, budget = self.waiting[0], self.budget
        ahead = islice(self.waiting, 4 * budget.slots)
        longest = max(state.max_cached for state in ahead if budget.slots > 1 or state.prefix is first.prefix)
        capacity = -(-longest // 64) * 64
        if budget.slots > 1:
            share = budget.kv_tokens // budget.slots // 64 * 64
            capacity = max(capacity, min(2 * capacity, share), budget.slot_tokens // 64 * 64)
        capacity = min(capacity, budget.kv_tokens)
        return max(1, min(budget.slots, budget.kv_tokens // capacity)), capacity

    def admit(self) -> list[RequestState]:
        """Move waiting requests into free slots, preferably into the slot of a sibling that has left."""
        left = [slot for slot, state in enumerate(self.running) if state.has_left]
        free = [*left, *range(len(self.running), self.slots)]
        admitted = [] if self._should_gather(left, len(free)) else self._choose_next(left, len(free))
        others = [state for state in admitted if not self._enter_after_sibling(state, free)]
        for slot, state in zip(free, others, strict=False):
            self.running[slot : slot + 1] = [state]
            self._held[slot : slot + 1] = [Prefix(state.item, 0)]
        if self.pages and admitted:
            entered = set(admitted)
            wanted = {slot: state.max_cached for slot, state in enumerate(self.running) if state in entered}
            self.pages.resize({**dict.fromkeys(left, 0), **wanted})
        return admitted

    def _should_gather(self, left: Sequence[int], num_free: int) -> bool:
        """Whether the prompts that can enter now are too short for a pass, and more can enter with them soon.

        Never while an eighth of the slots would be empty, nor if the next request would lose a prefix by it.
        """
        if len(left) == len(self.running) or 8 * num_free > self.slots or num_free >= len(self.waiting):
            return False
        num_tokens = sum(state.num_prompt_tokens for state in islice(self.waiting, num_free))
        return num_tokens < self.budget.min_prefill_tokens and not self.is_next_sibling_of_left

    def _choose_next(self, left: Sequence[int], num_free: int) -> list[RequestState]:
        """Remove requests from the front of the queue, as many as there are slots and memory for.

        Choose none if more slots would be worth that the running requests finish first.
        """
        chosen: list[RequestState] = []
        if not self.waiting or not num_free or self._should_resize():
            return chosen
        room = self.pages.count_available(left) if self.pages else 0
        while self.waiting and len(chosen) < num_free and self.waiting[0].max_cached <= self.capacity:
            room -= self.pages.count_needed(self.waiting[0].max_cached) if self.pages else 0
            if room < 0:
                break
            chosen.append(self.waiting.popleft())
        return chosen

    def _should_resize(self) -> bool:
        """Whether the slots are longer than the next requests need, and a quarter more of them would fit."""
        if self.pages or self.slots == self.budget.slots:
            return False
        return self._size_slots()[0] >= 1.25 * self.slots

    def _enter_after_sibling(self, state: RequestState, free: list[int]) -> bool:
        """Give the request the slot of a sibling that has left, which may be the last slot with their prefix."""
        for slot in free:
            if slot < len(self._held) and self._held[slot] is state.prefix:
                self.running[slot] = state
                free.remove(slot)
                return True
        return False

    def retire(self) -> list[Move]:
        """Remove the requests that have left; return the moves of the last requests into the gaps."""
        moves = []
        for slot in reversed(range(len(self.running))):
            if self.running[slot].has_left:
                if self.pages:
                    self.pages.resize({slot: 0})
                last, held = self.running.pop(), self._held.pop()
                if slot < len(self.running):
                    self.running[slot], self._held[slot] = last, held
                    moves.append(Move(len(self.running), slot, last.num_cached))
                    if self.pages:
                        self.pages.move(len(self.running), slot)
        return moves

    def read_table(self) -> NDArray[np.int32] | None:
        """Return the pages of each slot, int32[slots, n], if they have changed since the last call."""
        if self.pages is None or not self.pages.has_changed:
            return None
        self.pages.has_changed = False
        return self.pages.table

    def split_prompts(self, admitted: Iterable[RequestState]) -> tuple[list[Span], list[Span]]:
        """Return whole prompts to compute, then the rests of prompts whose prefix will be in a slot.

        Call it after all moves. The prefix of a rest may come from one of the whole prompts.
        """
        slots = {state: slot for slot, state in enumerate(self.running)}
        held = {prefix: slot for slot, prefix in enumerate(self._held)}
        whole, rest = [], []
        for state in admitted:
            slot, start, ids = slots[state], state.prefix.length, state.request.input_ids
            if start and state.prefix in held:
                rest.append(Span(state, ids[start:], start, held[state.prefix], slot))
            else:
                whole.append(Span(state, ids, 0, slot, slot))
                held[state.prefix] = slot
            self._held[slot] = state.prefix
        return whole, rest

    @property
    def is_next_sibling_of_left(self) -> bool:
        """Whether only slots of requests that have left hold the next request's prefix.

        That request should enter before a step reuses these slots.
        """
        kept = {prefix for state, prefix in zip(self.running, self._held, strict=True) if not state.has_left}
        return bool(self.waiting) and self.waiting[0].prefix in set(self._held) - kept

    def select_items_to_encode(self, entering: Iterable[Item]) -> list[Item]:
        """Return the entering items that lack embeddings, and the next waiting ones that fill up the vision passes."""
        items = dict.fromkeys(item for item in entering if item.visual is None)
        num_tiles, max_tiles = sum(len(item.tiles) for item in items), self.budget.vision_tiles
        self._add_waiting(items, -num_tiles % max_tiles)
        return list(items)

    def list_next_items(self) -> list[Item]:
        """Return the next waiting items that lack embeddings, as many as one vision pass takes."""
        items: dict[Item, None] = {}
        self._add_waiting(items, self.budget.vision_tiles)
        return list(items)

    def _add_waiting(self, items: dict[Item, None], room: int) -> None:
        """Add the next waiting items that lack embeddings, with at most `room` tiles."""
        for item in (state.item for state in islice(self.waiting, self.budget.slots)):
            if not room or len(item.tiles) > room:
                break
            if item.visual is None and item not in items:
                items[item] = None
                room -= len(item.tiles)

    def drop_embeddings(self, items: Iterable[Item]) -> None:
        """Drop the embeddings of items that no waiting request needs; siblings wait next to each other."""
        for item in items:
            if not self.waiting or self.waiting[0].item is not item:
                item.visual = None

    def restart_all(self) -> None:
        """Move the running requests back to the front of the queue, in order."""
        for state in reversed(self.running):
            if not state.has_left:
                state.restart()
                self.waiting.appendleft(state)
        self.running.clear()
        self._held.clear()
        self.slots = self.capacity = 0
        self.pages = None


def pack_into_passes(prompts: Iterable[Span], max_tokens: int) -> Iterator[list[Span]]:
    """Yield groups of whole prompts, longest first, with at most `max_tokens` tokens in total or one prompt."""
    group: list[Span] = []
    num_tokens = 0
    for span in sorted(prompts, key=lambda span: -len(span.ids)):
        num_tokens += len(span.ids)
        if group and num_tokens > max_tokens:
            yield group
            group, num_tokens = [], len(span.ids)
        group.append(span)
    if group:
        yield group


def pad_into_passes(spans: Iterable[Span], max_tokens: int) -> Iterator[list[Span]]:
    """Yield groups of spans of similar length, longest first; a group has at most `max_tokens` tokens or one span.

    A span is padded by at most a fifth or 32 tokens, which costs less than one more pass.
    """
    group: list[Span] = []
    for span in sorted(spans, key=lambda span: -len(span.ids)):
        if group and not _can_add(span, group, max_tokens):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _can_add(span: Span, group: Sequence[Span], max_tokens: int) -> bool:
    width, cached = len(group[0].ids), max(span.start, *(other.start for other in group))
    tokens = (len(group) + 1) * (width + cached // CACHED_PER_TOKEN)
    return tokens <= max_tokens and width - len(span.ids) <= max(width // 5, 32)
