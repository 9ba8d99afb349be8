"""Rows and slots, without a device: nobody is lost, nobody waits beside a free slot, no slot is shared."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ovis_model.sampling import RandomStream
from ovis_model.scheduler import Budget, Row, Scheduler, prefill_groups
from ovis_model.types import Request, SamplingParams


def row_of(prompt: int, output: int) -> Row:
    request = Request(np.zeros(prompt, np.int32), np.zeros((0, 3, 2, 2), np.uint8), np.zeros((0, 2), np.int32))
    return Row(request, SamplingParams(max_new_tokens=output), RandomStream(0))


LENGTHS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12)), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 6), st.integers(110, 700))
def test_every_row_runs_to_its_end_in_a_slot_of_its_own(
    lengths: list[tuple[int, int]], slots: int, kv_tokens: int
) -> None:
    scheduler = Scheduler(Budget(kv_tokens=kv_tokens, slots=slots))
    rows = [row_of(*pair) for pair in lengths]
    scheduler.waiting.extend(rows)
    held: dict[int, Row] = {}  # what the cache would hold: slot -> row
    steps = 0
    while scheduler.waiting or scheduler.running:
        admitted = scheduler.admit()
        held.update(admitted)
        for move in scheduler.retire():
            assert held[move.source].num_cached == move.length
            held[move.target] = held[move.source]
        if scheduler.plan_cache():
            assert not scheduler.running
            assert scheduler.slots * scheduler.capacity <= kv_tokens
            held.clear()
            continue
        assert len(scheduler.running) <= scheduler.slots
        assert all(held[slot] is row for slot, row in enumerate(scheduler.running))
        if len(scheduler.running) < scheduler.slots and scheduler.waiting:
            assert scheduler.waiting[0].max_tokens > scheduler.capacity
        for row in scheduler.running:
            row.append(0, -1.0)
            assert row.num_cached <= scheduler.capacity
            row.finish_reason = "length" if len(row.output_ids) == row.params.max_new_tokens else None
        steps += 1
    assert all(len(row.output_ids) == row.params.max_new_tokens for row in rows)
    assert steps <= sum(output for _, output in lengths) + len(rows)


def test_nobody_waits_for_the_longest_row() -> None:
    scheduler = Scheduler(Budget(kv_tokens=10_000, slots=4))
    scheduler.waiting.extend([row_of(5, 100)] + [row_of(5, 5) for _ in range(60)])
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


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.integers(1, 2000))
def test_prefill_groups_fit_their_budget(lengths: list[int], max_tokens: int) -> None:
    rows = [row_of(length, 1) for length in lengths]
    groups = list(prefill_groups(rows, max_tokens))
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, rows))
    for group in groups:
        widths = [row.num_prompt_tokens for row in group]
        assert len(group) == 1 or max(widths) * len(group) <= max_tokens
        assert widths[0] == max(widths) and min(widths) >= 0.8 * max(widths)


def test_one_long_row_does_not_cost_the_others_their_slots_for_ever() -> None:
    scheduler = Scheduler(Budget(kv_tokens=300, slots=4))
    scheduler.waiting.append(row_of(199, 2))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (1, 256)
    scheduler.waiting.clear()
    scheduler.waiting.extend(row_of(10, 2) for _ in range(8))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (4, 64)
    assert not scheduler.plan_cache()


def test_with_one_slot_the_cache_is_as_long_as_the_next_row_needs() -> None:
    scheduler = Scheduler(Budget(kv_tokens=1000, slots=1))
    scheduler.waiting.extend([row_of(20, 2), row_of(400, 2)])
    assert scheduler.plan_cache() and scheduler.capacity == 64


def test_slots_have_room_for_rows_to_come_where_there_is_memory() -> None:
    scheduler = Scheduler(Budget(kv_tokens=100_000, slots=4))
    scheduler.waiting.append(row_of(100, 2))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (4, 256)
    scheduler = Scheduler(Budget(kv_tokens=100_000, slots=4, slot_tokens=25_000))
    scheduler.waiting.append(row_of(100, 2))
    assert scheduler.plan_cache() and (scheduler.slots, scheduler.capacity) == (4, 24_960)
