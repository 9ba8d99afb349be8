"""Count in a separate actor how often a process died on a piece of work, so that no row is retried forever.

Ray restarts an actor and repeats its work without limit, so a row that kills its process would never finish.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.cluster.actor import register_fast_exit

MAX_TRIES = 2  # for a batch, before its rows are tried alone; for a row alone, before it becomes an error row
GIVEN_UP = f"the process died {MAX_TRIES} times on this row alone"


class AttemptCounts:
    """Numbers of unfinished attempts by name of the work. Lives in an actor, or in this process without Ray."""

    def __init__(self) -> None:
        register_fast_exit()
        self._begun: Counter[str] = Counter()

    def begin(self, work: str) -> int:
        """Return how often `work` has begun without ending, this attempt included."""
        self._begun[work] += 1
        return self._begun[work]

    def end(self, work: str) -> None:
        """Reset the count of `work`, which is finished."""
        del self._begun[work]


def start_attempt_counts() -> Any:
    """Start an AttemptCounts actor on the driver's node, so that it survives the loss of any other node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(AttemptCounts).options(**options).remote()


class RemoteAttempts:
    """Proxy of an AttemptCounts actor for other processes."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, work: str) -> int:
        """Return how often `work` has begun without ending, this attempt included. Waits for the actor."""
        import ray

        return int(ray.get(self._actor.begin.remote(work)))

    def end(self, work: str) -> None:
        """Reset the count of `work`, without waiting for the actor."""
        self._actor.end.remote(work)


Attempts = AttemptCounts | RemoteAttempts


class SharedExclusiveLock:
    """A lock that many threads share or one holds exclusively.

    A suspicious row is tried exclusively: if the process dies, no other row can be the cause.
    """

    def __init__(self) -> None:
        self._exclusive = threading.Lock()
        self._changed = threading.Condition()
        self._num_sharing = 0

    @contextmanager
    def hold_shared(self) -> Iterator[None]:
        """Hold the lock together with other threads, after any exclusive holder."""
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
        """Hold the lock alone: block new holders and wait until all others have released it."""
        with self._exclusive:
            with self._changed:
                self._changed.wait_for(lambda: self._num_sharing == 0)
            yield
