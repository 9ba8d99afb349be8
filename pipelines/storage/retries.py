"""Retry possibly transient faults of a store: bounded attempts, exponential backoff with jitter."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipelines.errors import BusyFault, FinalFault

T = TypeVar("T")

_FINAL = (FinalFault, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_final(error: OSError) -> bool:
    """Return whether a retry cannot help."""
    return isinstance(error, _FINAL) or error.errno in _FINAL_NUMBERS


@dataclass(frozen=True)
class Retries:
    """Limits on retries: at most `max_attempts` attempts, and no retry after a fault later than `patience_s`."""

    max_attempts: int
    first_pause_s: float = 0.25
    max_requested_pause_s: float = 60.0  # limit on the pause that a store requests
    patience_s: float = 120.0  # a stalled server that times out after 60 s is tried twice, not five times

    def run(self, action: Callable[[], T]) -> T:
        """Return the result of `action`, which may run several times. Raise the OSError of the last attempt."""
        deadline_s = time.monotonic() + self.patience_s
        for attempt in range(1, self.max_attempts):
            try:
                return action()
            except OSError as error:
                if is_final(error) or time.monotonic() > deadline_s:
                    raise
                time.sleep(self.compute_pause_s(attempt, error))
        return action()

    def compute_pause_s(self, attempt: int, error: OSError | None = None) -> float:
        """Return how long to wait after attempt number `attempt`, counted from 1, has failed.

        The pause doubles and is random, so that a thousand readers of one store do not retry at the same time.
        """
        longest_s = self.first_pause_s * 2 ** (attempt - 1)
        requested_s = error.retry_after_s if isinstance(error, BusyFault) else 0.0
        return min(requested_s, self.max_requested_pause_s) + random.uniform(longest_s / 2, longest_s)
