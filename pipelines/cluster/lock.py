"""A lock to try suspicious work while nothing else runs in the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
