"""Choose the rows of each step, from the seed and the step alone: no state, so that any step can be resumed exactly.

An epoch is a permutation of row numbers. Rows of similar length form a batch, because a batch is as long as its longest
row. Neither the number of workers nor that of their loaders changes which rows a step has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_BATCHES_PER_GROUP = 32  # whose rows are sorted by length together: more save padding, fewer mix better


class Position(NamedTuple):
    """A place in the order of rows: the epoch, and the step in it, both from 0."""

    epoch: int
    step: int


@dataclass(frozen=True, eq=False)
class RowOrder:
    """The order of the rows `numbers`, each with its length in tokens and its data set.

    batch_size: rows per step, of all workers and accumulated micro-batches together.
    weights: how often an epoch has each row of a data set; a fraction takes other rows in each epoch.
    """

    numbers: Rows
    lengths: Rows
    data_sets: Rows
    weights: tuple[float, ...]
    batch_size: int
    seed: int

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that an epoch has."""
        return sum(round(weight * int((self.data_sets == n).sum())) for n, weight in enumerate(self.weights))

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch; the last one may have fewer rows."""
        return -(-self.rows_per_epoch // self.batch_size)

    def locate(self, step: int) -> Position:
        """Return the place of a step, counted from 0 over all epochs."""
        return Position(*divmod(step, self.steps_per_epoch))

    def get_rows(self, step: int) -> Rows:
        """Return the row numbers of a step, by length."""
        position = self.locate(step)
        return self.numbers[self._order_epoch(position.epoch)[position.step]]

    @lru_cache(2)  # noqa: B019  (one order per run)
    def _order_epoch(self, epoch: int) -> list[Rows]:
        """Return the places in `numbers` of the rows of each step of an epoch."""
        rows = np.concatenate([self._draw_rows(n, weight, epoch) for n, weight in enumerate(self.weights)])
        rows = rows[shuffle(len(rows), self.seed, epoch, "rows")]
        per_group = self.batch_size * _BATCHES_PER_GROUP
        groups = [rows[start : start + per_group] for start in range(0, len(rows), per_group)]
        batches = [batch for group in groups for batch in _cut(self._sort(group), self.batch_size)]
        if len(batches[-1]) == self.batch_size:
            return self._mix(batches, epoch)
        return [*self._mix(batches[:-1], epoch), batches[-1]]

    def _draw_rows(self, number: int, weight: float, epoch: int) -> Rows:
        rows = np.flatnonzero(self.data_sets == number)
        times, rest = divmod(round(weight * len(rows)), max(1, len(rows)))
        some = rows[shuffle(len(rows), self.seed, epoch, f"data set {number}")[:rest]]
        return np.concatenate([np.tile(rows, times), some])

    def _sort(self, rows: Rows) -> Rows:
        return rows[np.lexsort((rows, self.lengths[rows]))]

    def _mix(self, batches: list[Rows], epoch: int) -> list[Rows]:
        """Return the batches in another order, those with the longest row first: memory that is too small fails early.

        The batches of a group are mixed with those of all others.
        """
        mixed = [batches[i] for i in shuffle(len(batches), self.seed, epoch, "batches")]
        longest = max(range(len(mixed)), key=lambda i: self.lengths[mixed[i]].max(), default=0)
        return [*mixed[longest : longest + 1], *mixed[:longest], *mixed[longest + 1 :]]


def shuffle(count: int, seed: int, epoch: int, purpose: str) -> Rows:
    """Return a permutation. Raw bits of Philox: unlike `permutation`, they are the same in every version of numpy."""
    key = np.frombuffer(purpose.encode()[:16].ljust(16, b"\0"), np.uint64)
    counter = np.array([0, 0, epoch, seed], np.uint64)
    return np.argsort(np.random.Philox(counter=counter, key=key).random_raw(count), kind="stable")


def _cut(rows: Rows, size: int) -> list[Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def share_rows(rows: Rows, micro_batch_size: int, num_workers: int) -> list[list[Rows]]:
    """Return the micro-batches of each worker. All have the same number; the last ones may be empty.

    Neighbours in `rows` have similar lengths, so they form a micro-batch, and workers take turns.
    """
    micro_batches: Sequence[Rows] = _cut(rows, micro_batch_size)
    per_worker = -(-len(micro_batches) // num_workers)
    missing = per_worker * num_workers - len(micro_batches)
    filled = [*micro_batches, *[rows[:0]] * missing]
    return [filled[worker::num_workers] for worker in range(num_workers)]
