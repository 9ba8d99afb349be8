"""Count in an actor of their own how often processes died on a piece of work, so that no row is retried for ever.

Ray restarts an actor and runs its work again for ever; so a row that kills its process would never end.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.cluster.actor import register_fast_exit

MAX_TRIES = 2  # of a batch before its rows are tried alone, and of a row alone before it is given up
GIVEN_UP = f"the process died {MAX_TRIES} times on this row alone"


class AttemptCounts:
    """The counts: in an actor of the driver, or in this process if nothing else runs."""

    def __init__(self) -> None:
        register_fast_exit()
        self._begun: Counter[str] = Counter()

    def begin(self, work: str) -> int:
        """Return how often `work` was begun and not ended, this time included."""
        self._begun[work] += 1
        return self._begun[work]

    def end(self, work: str) -> None:
        del self._begun[work]


def start_attempt_counts() -> Any:
    """Start an AttemptCounts actor on the driver's own node: it lives as long as the run, whatever other nodes do."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(AttemptCounts).options(**options).remote()


class RemoteAttempts:
    """The counts of an AttemptCounts actor, seen from another process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, work: str) -> int:
        import ray

        return int(ray.get(self._actor.begin.remote(work)))

    def end(self, work: str) -> None:
        self._actor.end.remote(work)


Attempts = AttemptCounts | RemoteAttempts


class SharedExclusiveLock:
    """Many threads together, or one alone: while a suspicious row is tried, nothing else may be blamed for a death."""

    def __init__(self) -> None:
        self._exclusive = threading.Lock()
        self._changed = threading.Condition()
        self._num_sharing = 0

    @contextmanager
    def hold_shared(self) -> Iterator[None]:
        with self._exclusive, self._changed:
            self._num_sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def hold_exclusive(self) -> Iterator[None]:
        with self._exclusive:
            with self._changed:
                self._changed.wait_for(lambda: self._num_sharing == 0)
            yield
