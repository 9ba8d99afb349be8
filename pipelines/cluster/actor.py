"""End the processes of actors and ranks for certain, also where C++ libraries hang at exit."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def register_fast_exit() -> None:
    """Have the process of this actor `exit_at_once` where Python ends; elsewhere do nothing.

    Ray counts an actor as dead before its process is (ray#52322): nobody would end one that hangs on its way out, and
    its memory, on a GPU too, would never come back.
    """
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        atexit.register(
            exit_at_once
        )  # the last to register is called first: what Python libraries do at exit is not needed


def exit_at_once() -> NoReturn:
    """End this process with exit code 0, past what C++ destroys at its end.

    gloo's threads outlive their group; one that lets go of a tensor while Python ends aborts the process (torch 2.13).
    Ray can wait for itself there for ever (2.60: a publisher answers into the event loop that is being destroyed).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
