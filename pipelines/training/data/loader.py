"""Prepare the examples of the next micro-batches while the current one is trained on, in a thread or in Ray actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

from pipelines.cluster.actor import register_fast_exit
from pipelines.errors import RowError
from pipelines.storage import store
from pipelines.training.data.check import PrepareOptions
from pipelines.training.data.prepare import AnyExample
from pipelines.training.data.row_table import RowTable

T = TypeVar("T")

_AHEAD_PER_LOADER = 2  # micro-batches; tiles are large

Pending = Callable[[], list[AnyExample]]
"""Waits for the examples of a micro-batch."""


@dataclass(frozen=True)
class RowSource:
    """Where rows are, and what decides their examples."""

    output: str
    num_rows: int
    options: PrepareOptions


class Loader:
    """Prepares rows by number, for use by one thread."""

    def __init__(self, source: RowSource) -> None:
        """Map the rows and load the tokenizer."""
        register_fast_exit()
        self._table = RowTable(source.output, source.num_rows)
        self._preparer = source.options.make_preparer()

    def load(self, rows: Sequence[int]) -> list[AnyExample]:
        """Return the examples of rows that the check found good. Raise RowError if one has changed since then."""
        prepared = self._preparer.prepare(self._table.get_dialogues(rows))
        return [self._expect(row, found.example, found.error) for row, found in zip(rows, prepared, strict=True)]

    def _expect(self, row: int, example: AnyExample | None, error: RowError | None) -> AnyExample:
        if example is not None:
            return example
        listed = self._table.get(row)
        stage = error.stage if error else "read"
        raise RowError(
            stage,
            f"{listed.place} of {store.redact(listed.uri)} could be read when the run began, and now fails: {error}; "
            "restore the file and run the same command again",
        )


class LoaderPool:
    """Loaders that take turns: what they return has the order of the request, however many there are."""

    def __init__(self, source: RowSource, num_actors: int) -> None:
        """Start that many Ray actors; with 0, a thread of this process prepares."""
        self._submits = [_start_actor(source) for _ in range(num_actors)] or [_start_thread(source)]

    def load_ahead(self, micro_batches: Iterable[tuple[T, Sequence[int]]]) -> Iterator[tuple[T, list[AnyExample]]]:
        """Yield each micro-batch, in order, with the examples of its rows."""
        waiting: deque[tuple[T, Pending]] = deque()
        for (micro_batch, rows), submit in zip(micro_batches, cycle(self._submits), strict=False):
            waiting.append((micro_batch, submit(rows)))
            if len(waiting) > _AHEAD_PER_LOADER * len(self._submits):
                yield _wait(*waiting.popleft())
        while waiting:
            yield _wait(*waiting.popleft())


def _wait(micro_batch: T, pending: Pending) -> tuple[T, list[AnyExample]]:
    return micro_batch, pending()


def _start_thread(source: RowSource) -> Callable[[Sequence[int]], Pending]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="load")
    loader = pool.submit(Loader, source)
    return lambda rows: pool.submit(lambda: loader.result().load(rows)).result


def _start_actor(source: RowSource) -> Callable[[Sequence[int]], Pending]:
    import ray

    loader: Any = ray.remote(Loader).options(num_cpus=0).remote(source)

    def submit(rows: Sequence[int]) -> Pending:
        reference = loader.load.remote(list(rows))
        return lambda: ray.get(reference)

    return submit
