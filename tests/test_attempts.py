"""A row is blamed only if outside causes cannot explain its deaths; a stage that only dies stops the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from pipelines.cluster.attempts import CONTROL, MAX_DEATHS, MIN_PATIENCE_S, WARN_DEATHS, AttemptCounts
from pipelines.cluster.exits import Exit, Process
from pipelines.errors import ProcessesDie

WORK = "generate rows"
_UNKNOWN = Exit("unknown", "10.0.0.1", "it was killed")
_STORM_S = 120.0


class KilledError(Exception):
    pass


@dataclass
class Machine:
    """An actor's processes in simulated time: each takes a while to start and is killed every `kill_s` in a storm."""

    kill_s: float
    seconds_per_row: float
    poison: frozenset[int] = frozenset()
    seed: int = 0
    now_s: float = 0.0
    num_deaths: int = 0
    results: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = AttemptCounts("replica", lambda _: _UNKNOWN, lambda: self.now_s)
        self._random, self._next_kill_s = random.Random(self.seed), self.kill_s

    def run(self, rows: Sequence[int]) -> None:
        """Try the rows alone in one process after another until all have a result."""
        while len(self.results) < len(rows):
            self.counts.start(Process("actor", str(self.num_deaths), "node", "10.0.0.1"))
            try:
                self._live(rows)
            except KilledError:
                self.num_deaths += 1

    def _live(self, rows: Sequence[int]) -> None:
        self._work(self._random.uniform(1.5, 3))
        for row in self.counts.resume_alone(WORK, rows).order:
            if self.counts.begin_alone(row, "actor"):
                self._work(self.seconds_per_row, dies=row in self.poison)
                self.counts.end_alone(WORK, row, "ok", "actor")
                if row != CONTROL:
                    self.results[row] = "ok"
            else:
                self.counts.keep(WORK, row, "blamed")
                self.results[row] = "blamed"

    def _work(self, seconds: float, *, dies: bool = False) -> None:
        end_s = self.now_s + seconds
        if self._next_kill_s <= min(end_s, _STORM_S):
            self.now_s, self._next_kill_s = self._next_kill_s, self._next_kill_s + self.kill_s
            raise KilledError
        self.now_s = end_s
        if dies:
            raise KilledError


@pytest.mark.parametrize("kill_s", [4.0, 5.0, 8.0])
@pytest.mark.parametrize("seconds_per_row", [0.3, 1.0])
def test_kills_from_outside_blame_only_the_poison_row(kill_s: float, seconds_per_row: float) -> None:
    """In 200 storms of up to 30 kills, hardly ever is one of the 59 healthy rows blamed."""
    num_wrong = 0
    for seed in range(200):
        machine = Machine(kill_s, seconds_per_row, frozenset({17}), seed)
        machine.run(range(60))
        assert machine.results.pop(17) == "blamed"
        num_wrong += sum(result == "blamed" for result in machine.results.values())
    assert num_wrong <= 4


@pytest.mark.parametrize(("num_rows", "max_deaths"), [(1, 6), (4, 5), (32, 3)])
def test_in_peace_a_poison_row_is_blamed_soon(num_rows: int, max_deaths: int) -> None:
    machine = Machine(1e9, 0.3, frozenset({0}))
    machine.run(range(num_rows))
    assert machine.results == {row: "ok" if row else "blamed" for row in range(num_rows)}
    assert machine.num_deaths <= max_deaths


def test_rows_that_all_kill_their_process_are_blamed_one_by_one() -> None:
    machine = Machine(1e9, 0.3, frozenset(range(4)))
    machine.run(range(4))
    assert set(machine.results.values()) == {"blamed"}


def test_a_process_that_dies_at_its_start_blames_no_row() -> None:
    """Something kills each process 2 s after its start, in the middle of its first row."""
    counts = AttemptCounts("replica", lambda _: _UNKNOWN, lambda: 0.0)
    for number in range(200):
        counts.start(Process("actor", str(number), "node", "10.0.0.1"))
        assert counts.begin_alone(counts.resume_alone(WORK, [0, 1, 2, 3]).order[0], "actor")


@pytest.mark.parametrize("kind", ["memory", "node"])
def test_a_death_of_known_cause_counts_for_no_work(kind: str) -> None:
    counts = AttemptCounts("replica", lambda _: Exit(kind, "10.0.0.1", "known"))  # type: ignore[arg-type]
    for number in range(10):
        counts.start(Process("actor", str(number), "node", "10.0.0.1"))
        assert counts.begin("a batch", "actor") == 1
        assert counts.begin_alone(7, "actor")
    deaths, in_a_row = counts.read_deaths()
    assert (len(deaths), in_a_row) == (9, 9)
    assert counts.read_deaths() == ([], 9)


def test_deaths_without_a_finished_row_stop_the_run_with_the_reason() -> None:
    now_s = 0.0
    counts = AttemptCounts("replica", lambda _: _UNKNOWN, lambda: now_s)
    counts.start(Process("actor", "first", "node", "10.0.0.1"))
    for _ in range(MAX_DEATHS + WARN_DEATHS):  # as many as one likes within a short time
        counts.start(Process("actor", "next", "node", "10.0.0.1"))
    now_s = MIN_PATIENCE_S
    with pytest.raises(ProcessesDie, match=r"a replica died \d+ times in 5 minutes .* it was killed"):
        counts.start(Process("actor", "last", "node", "10.0.0.1"))
    counts.begin("a batch", "actor")
    counts.end("a batch", "actor")
    counts.start(Process("actor", "after", "node", "10.0.0.1"))
    assert counts.read_deaths()[1] == 1


def test_calls_that_end_with_one_engine_are_one_death() -> None:
    counts = AttemptCounts("replica", lambda _: _UNKNOWN)
    counts.start(Process("actor", "first", "node", "10.0.0.1"))
    for _ in range(3):
        counts.note_death("the engine died: a cosmic ray", "actor")
    counts.start(Process("actor", "second", "node", "10.0.0.1"))
    assert [death.reason for death in counts.read_deaths()[0]] == ["the engine died: a cosmic ray"]


def test_results_of_rows_tried_alone_are_kept_until_their_batch_ends() -> None:
    counts = AttemptCounts("replica", lambda _: _UNKNOWN)
    counts.begin_alone(3, "actor")
    counts.end_alone(WORK, 3, "three", "actor")
    assert counts.resume_alone(WORK, [2, 3]).kept == {3: "three"} and counts.read_kept() == ["three"]
    counts.end(WORK, "actor")
    assert counts.read_kept() == []
