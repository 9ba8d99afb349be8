"""How the process of an actor ends."""

from __future__ import annotations

import atexit

from ovis_model.process import leave


def end_with_python() -> None:
    """Have the process of this actor `leave` where Python ends; elsewhere do nothing.

    Ray counts an actor as dead before its process is (ray#52322): nobody would end one that hangs on its way out, and
    its memory, on a GPU too, would never come back.
    """
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        atexit.register(leave)  # the last to register is called first: what Python libraries do at exit is not needed
