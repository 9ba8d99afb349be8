"""The order of rows depends on the seed and the step only; each epoch has every row as often as its weight says."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from pipelines.training.data.order import RowOrder, share_rows

LENGTHS = np.random.default_rng(0).integers(5, 500, 1003)


def make_order(batch_size: int = 16, seed: int = 0, weights: tuple[float, ...] = (1.0,)) -> RowOrder:
    data_sets = np.arange(len(LENGTHS)) % len(weights)
    return RowOrder(np.arange(len(LENGTHS)), LENGTHS, data_sets, weights, batch_size, seed)


def list_epoch(order: RowOrder, epoch: int) -> list[list[int]]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [order.get_rows(step).tolist() for step in steps]


def test_an_epoch_is_a_permutation_and_each_one_is_another() -> None:
    order = make_order()
    epochs = [list_epoch(order, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(chain(*epoch)) == list(range(len(LENGTHS)))
        assert [len(rows) for rows in epoch] == [16] * 62 + [11]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list_epoch(make_order(seed=1), 0) != epochs[0]


def test_any_step_is_found_without_those_before_it() -> None:
    steps = [*list_epoch(make_order(), 0), *list_epoch(make_order(), 1)]
    assert make_order().get_rows(100).tolist() == steps[100]


def test_rows_of_a_batch_have_similar_lengths_and_the_longest_comes_first() -> None:
    batches = list_epoch(make_order(), 0)
    spread = np.mean([np.ptp(LENGTHS[rows]) for rows in batches])
    assert spread < 0.1 * np.ptp(LENGTHS)
    assert LENGTHS[batches[0]].max() == LENGTHS.max()


def test_a_weight_is_how_often_a_row_is_seen() -> None:
    order = make_order(weights=(2.5, 0.25))
    seen = [Counter(chain(*list_epoch(order, epoch))) for epoch in range(2)]
    for counts in seen:
        assert {counts[row] for row in range(0, 1003, 2)} == {2, 3}
        assert {counts[row] for row in range(1, 1003, 2)} == {0, 1}
        assert sum(counts.values()) == order.rows_per_epoch == round(2.5 * 502) + round(0.25 * 501)
    assert seen[0] != seen[1]


@pytest.mark.parametrize(("micro_batch", "workers"), [(16, 1), (4, 1), (4, 2), (2, 3), (16, 2)])
def test_workers_share_the_rows_of_a_step(micro_batch: int, workers: int) -> None:
    rows = make_order().get_rows(3)
    shares = share_rows(rows, micro_batch, workers)
    assert len({len(share) for share in shares}) == 1
    assert sorted(np.concatenate(list(chain(*shares))).tolist()) == sorted(rows.tolist())


def test_the_order_is_the_same_in_every_version() -> None:
    assert make_order().get_rows(0)[:4].tolist() == [636, 55, 189, 825]
