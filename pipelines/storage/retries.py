"""Faults of a store that may pass: tried again a bounded number of times, each time later, never all at once."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.errors import BusyFault, FinalFault

ATTEMPTS = 5
MORE_ATTEMPTS = 8  # 16 to 32 s, of a store that holds a whole run; a host of the web is one of many
PATIENCE_S = 120.0  # none is begun later: 60 s of a stalled server are waited for twice, not five times
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 60.0

T = TypeVar("T")


_FINAL = (FinalFault, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_final(error: OSError) -> bool:
    return isinstance(error, _FINAL) or error.errno in _FINAL_NUMBERS


def retried(action: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """The result of `action`, which may be done several times. Raises the OSError of the last attempt."""
    deadline_s = time.monotonic() + PATIENCE_S
    for attempt in range(1, attempts):
        try:
            return action()
        except OSError as error:
            if is_final(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(pause_s(attempt, error))
    return action()


def pause_s(attempt: int, error: OSError | None = None) -> float:
    """How long to wait after the first, second ... attempt failed: doubling, and at random, so that a thousand
    readers of one store do not come back together."""
    longest = _FIRST_PAUSE_S * 2 ** (attempt - 1)
    asked = error.retry_after_s if isinstance(error, BusyFault) else 0.0
    return min(asked, _LONGEST_PAUSE_S) + random.uniform(longest / 2, longest)
