"""Scheduling of rows to slots, without a device: no row is lost or waits while a slot is free; no slot is shared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ovis_model.engine.requests import RequestState, make_states
from ovis_model.engine.scheduler import (
    CACHED_PER_TOKEN,
    Budget,
    Move,
    Scheduler,
    Span,
    pack_into_passes,
    pad_into_passes,
)
from ovis_model.types import Request, SamplingParams


def make_row(prompt: int, output: int) -> RequestState:
    request = Request(np.zeros(prompt, np.int32), np.zeros((0, 3, 2, 2), np.uint8), np.zeros((0, 2), np.int32))
    return make_states([request], [SamplingParams(max_new_tokens=output)])[0]


def make_siblings(shared: int, own: Sequence[tuple[int, int]]) -> list[RequestState]:
    """Make rows about one item, whose prompts share their first `shared` ids.

    `own` holds for each row the number of its further prompt ids and its number of output tokens.
    """
    tiles, sizes = np.zeros((0, 3, 2, 2), np.uint8), np.zeros((0, 2), np.int32)
    common = np.random.default_rng(shared).integers(0, 99, shared)
    requests, params = [], []
    for number, (length, output) in enumerate(own):
        ids = np.concatenate([common, np.full(length, 100 + number)]).astype(np.int32)
        requests.append(Request(ids, tiles, sizes, group="one picture"))
        params.append(SamplingParams(max_new_tokens=output))
    return make_states(requests, params)


class Slots:
    """Model of the cache: the prompt ids in each slot, at least those of a shared prefix."""

    def __init__(self) -> None:
        self.ids: dict[int, list[int]] = {}

    def fill(self, scheduler: Scheduler, admitted: list[RequestState]) -> None:
        for spans in scheduler.split_prompts(admitted):
            before = {slot: list(ids) for slot, ids in self.ids.items()}  # a pass reads before it writes
            for span in spans:
                assert span.target is not None and scheduler.running[span.target] is span.state
                self.ids[span.target] = [*before.get(span.source, [])[: span.start], *span.ids.tolist()]
                assert self.ids[span.target] == span.state.request.input_ids.tolist()

    def move(self, move: Move) -> None:
        self.ids[move.target] = self.ids[move.source][: move.length]

    def touch_unused(self, used: int) -> None:
        """Discard the slots from `used` on: a captured step may cover more rows than are running."""
        self.ids = {slot: ids for slot, ids in self.ids.items() if slot < used}


def check_pages(scheduler: Scheduler) -> None:
    """Assert that each running row has its own pages, enough for all its tokens, and that no other page is in use."""
    if scheduler.pages is None:
        return
    assert scheduler.pages.count * scheduler.pages.page_tokens <= max(scheduler.budget.kv_tokens, 112)
    rows = [list(pages[pages > 0]) for pages in scheduler.pages.table]
    needed = [scheduler.pages.count_needed(row.max_cached) for row in scheduler.running]
    assert list(map(len, rows)) == needed + [0] * (scheduler.slots - len(needed))
    used = list(chain(*rows))
    assert len(set(used)) == len(used) == scheduler.pages.count - scheduler.pages.count_available()


def is_next_too_large(scheduler: Scheduler) -> bool:
    tokens, pages = scheduler.waiting[0].max_cached, scheduler.pages
    if pages is None:
        return tokens > scheduler.capacity
    return pages.count_needed(tokens) > pages.count_available()


ITEMS = st.lists(
    st.tuples(st.integers(0, 60), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=9)),
    min_size=1,
    max_size=12,
)


@given(
    ITEMS,
    st.integers(1, 16),
    st.integers(110, 2000),
    st.integers(5, 200),
    st.sampled_from([0, 16]),
    st.sampled_from([0, 100]),
)
def test_every_row_runs_to_its_end_in_a_slot_that_holds_its_prompt(
    items: list[tuple[int, list[tuple[int, int]]]],
    slots: int,
    kv_tokens: int,
    fault_at: int,
    page_tokens: int,
    min_prefill_tokens: int,
) -> None:
    """This includes rows that restart; siblings copy their shared prefix from each other's slots."""
    scheduler = Scheduler(
        Budget(kv_tokens=kv_tokens, slots=slots, page_tokens=page_tokens, min_prefill_tokens=min_prefill_tokens)
    )
    rows = [row for item in items for row in make_siblings(*item)]
    scheduler.enqueue(rows)
    cache = Slots()
    steps = 0
    while scheduler.waiting or scheduler.running:
        admitted = scheduler.admit()
        for move in scheduler.retire():
            cache.move(move)
        if scheduler.plan_cache():
            assert not scheduler.running
            assert page_tokens or scheduler.slots * scheduler.capacity <= kv_tokens
            cache = Slots()
            continue
        check_pages(scheduler)
        cache.fill(scheduler, admitted)
        assert len(scheduler.running) <= scheduler.slots
        if len(scheduler.running) < scheduler.slots and scheduler.waiting:
            is_gathering = scheduler._should_gather([], scheduler.slots - len(scheduler.running))
            assert is_next_too_large(scheduler) or scheduler._should_resize() or is_gathering
        for slot, row in enumerate(scheduler.running):
            assert cache.ids[slot][: row.num_prompt_tokens] == row.request.input_ids.tolist()[: len(cache.ids[slot])]
            row.append(0, -1.0)
            assert row.num_cached <= scheduler.capacity
            row.finish_reason = "length" if len(row.output_ids) == row.params.max_new_tokens else None
        cache.touch_unused(len(scheduler.running))
        steps += 1
        if steps == fault_at:
            scheduler.restart_all()
    assert all(len(row.output_ids) == row.params.max_new_tokens for row in rows)
    assert steps <= 2 * sum(row.params.max_new_tokens for row in rows) + len(rows)


@given(st.integers(10, 50), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=2, max_size=12))
def test_siblings_compute_their_shared_prefix_once_with_any_number_of_slots(
    shared: int, own: list[tuple[int, int]]
) -> None:
    for slots, page_tokens in itertools.product((1, 3, 16), (0, 16)):
        scheduler = Scheduler(Budget(kv_tokens=10_000, slots=slots, page_tokens=page_tokens))
        rows = make_siblings(shared, own)
        scheduler.enqueue(rows)
        spans = []
        while scheduler.waiting or scheduler.running:
            admitted = scheduler.admit()
            scheduler.retire()
            scheduler.plan_cache()
            spans += list(chain(*scheduler.split_prompts(admitted)))
            for row in scheduler.running:
                row.append(0, -1.0)
                row.finish_reason = "length" if len(row.output_ids) == row.params.max_new_tokens else None
        assert [span.start for span in spans] == [0] + [shared] * (len(own) - 1)


def test_short_rows_do_not_wait_for_the_longest_one() -> None:
    scheduler = Scheduler(Budget(kv_tokens=10_000, slots=4))
    scheduler.waiting.extend([make_row(5, 100)] + [make_row(5, 5) for _ in range(60)])
    scheduler.plan_cache()
    steps = 0
    while scheduler.waiting or scheduler.running:
        scheduler.admit()
        scheduler.retire()
        for row in scheduler.running:
            row.append(0, 0.0)
            row.finish_reason = "length" if len(row.output_ids) == row.params.max_new_tokens else None
        steps += 1
    assert steps == 101  # 60 rows of 5 pass through three slots while the long one runs, and one step to leave


@given(
    st.lists(st.tuples(st.integers(1, 500), st.sampled_from([0, 300, 30_000])), min_size=1, max_size=50),
    st.integers(1, 2000),
)
def test_passes_fit_their_budget(lengths: list[tuple[int, int]], max_tokens: int) -> None:
    spans = [Span(make_row(1, 1), np.zeros(length, np.int32), start, 0, 0) for length, start in lengths]
    groups = list(pad_into_passes(spans, max_tokens))
    assert sorted(id(span) for group in groups for span in group) == sorted(map(id, spans))
    for group in groups:
        widths = [len(span.ids) for span in group]
        cached = max(span.start for span in group)
        assert len(group) == 1 or (max(widths) + cached // CACHED_PER_TOKEN) * len(group) <= max_tokens
        assert widths[0] == max(widths) <= min(widths) + max(32, max(widths) // 5)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.integers(1, 2000))
def test_prompts_of_any_lengths_share_a_pass(lengths: list[int], max_tokens: int) -> None:
    spans = [Span(make_row(1, 1), np.zeros(length, np.int32), 0, 0, 0) for length in lengths]
    groups = list(pack_into_passes(spans, max_tokens))
    assert sorted(id(span) for group in groups for span in group) == sorted(map(id, spans))
    sizes = [sum(len(span.ids) for span in group) for group in groups]
    assert all(len(group) == 1 or size <= max_tokens for group, size in zip(groups, sizes, strict=True))
    assert all(size + len(after[0].ids) > max_tokens for size, after in zip(sizes, groups[1:], strict=False))


def run_rows(budget: Budget, rows: Sequence[RequestState]) -> tuple[list[int], list[int]]:
    """Run rows to their end; return how many enter at once, each time that some do, and the rows of each step."""
    scheduler, entered, running = Scheduler(budget), [], []
    scheduler.enqueue(rows)
    while scheduler.waiting or scheduler.running:
        admitted = scheduler.admit()
        scheduler.retire()
        if scheduler.plan_cache():
            continue
        entered += [len(admitted)] if admitted else []
        running += [len(scheduler.running)] if scheduler.running else []
        for row in scheduler.running:
            row.append(0, 0.0)
            row.finish_reason = "length" if len(row.output_ids) == row.params.max_new_tokens else None
    return entered, running


def test_short_prompts_enter_together_and_long_ones_at_once() -> None:
    rng = np.random.default_rng(0)
    for prompt, fewest in ((300, 7), (2680, 1)):
        rows = [make_row(prompt, int(n)) for n in rng.integers(20, 120, 600)]
        budget = Budget(kv_tokens=400_000, slots=64, min_prefill_tokens=2048)
        entered, running = run_rows(budget, rows)
        assert min(entered[:-10]) == fewest
        busy = running[: -(max(row.params.max_new_tokens for row in rows))]
        assert min(busy) >= 64 - 64 // 8 and sum(busy) / len(busy) > 60


def test_a_row_whose_prefix_would_be_lost_enters_at_once() -> None:
    rows = [*(make_row(5, 40) for _ in range(7)), *make_siblings(50, [(3, 4)] * 6), *(make_row(5, 2) for _ in range(9))]
    scheduler = Scheduler(Budget(kv_tokens=10_000, slots=8, min_prefill_tokens=500))
    scheduler.enqueue(rows)
    spans = []
    while scheduler.waiting or scheduler.running:
        admitted = scheduler.admit()
        scheduler.retire()
        if scheduler.plan_cache():
            continue
        spans += list(chain(*scheduler.split_prompts(admitted)))
        for row in scheduler.running:
            row.append(0, 0.0)
            row.finish_reason = "length" if len(row.output_ids) == row.params.max_new_tokens else None
    siblings = [span for span in spans if span.state in rows[7:13]]
    assert [span.start for span in siblings] == [0] + [50] * 5


def test_slots_reduced_for_a_long_row_come_back_after_it() -> None:
    scheduler = Scheduler(Budget(kv_tokens=300, slots=4))
    scheduler.waiting.append(make_row(199, 2))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (1, 256)
    scheduler.waiting.clear()
    scheduler.waiting.extend(make_row(10, 2) for _ in range(8))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (4, 64)
    assert not scheduler.plan_cache()


def test_a_single_slot_is_as_long_as_the_next_row_needs() -> None:
    scheduler = Scheduler(Budget(kv_tokens=1000, slots=1))
    scheduler.waiting.extend([make_row(20, 2), make_row(400, 2)])
    assert scheduler.plan_cache() and scheduler.capacity == 64


def test_slots_have_room_for_longer_rows_if_memory_allows() -> None:
    scheduler = Scheduler(Budget(kv_tokens=100_000, slots=4))
    scheduler.waiting.append(make_row(100, 2))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (4, 256)
    scheduler = Scheduler(Budget(kv_tokens=100_000, slots=4, slot_tokens=25_000))
    scheduler.waiting.append(make_row(100, 2))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (4, 24_960)
