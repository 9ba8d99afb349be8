"""Run one rank of a tensor-parallel replica: the engine loop with a part of the model, in step with the other ranks.

`rank_pool` starts it as `python -m ovis_model.engine.rank_process FD PARENT`.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue

from ovis_model.child_process import end_with_parent
from ovis_model.engine.calls import Message, Outcome
from ovis_model.engine.engine_core import EngineCore, load_core
from ovis_model.engine.engine_loop import EngineLoop
from ovis_model.engine.rank_pool import Done, RankOptions, Ready
from ovis_model.network.tensor_parallel import join_ranks
from ovis_model.types import EngineDied

_SIGN_OF_LIFE_EVERY_S = 0.5


def main(fd: int, parent: int) -> None:
    """Receive RankOptions from the socket `fd` and run the rank until its owner closes it or dies."""
    link = Connection(fd)
    options: RankOptions = link.recv()
    end_with_parent(parent, lambda: shutil.rmtree(options.meeting_point.parent, ignore_errors=True))
    try:
        with join_ranks(options.rank, options.size, options.meeting_point, Pulse(link).beat) as shard:
            core = load_core(options.engine, shard)
            if core.model.device.type == "cuda":
                core.warm_up()
            link.send(Ready(core.model.device.type, core.describe()))
            messages: SimpleQueue[Message] = SimpleQueue()
            threading.Thread(target=_receive, args=(link, messages), daemon=True).start()
            EngineLoop(core, messages, partial(_deliver, link, core)).run()
    except Exception as error:
        if not isinstance(error, EngineDied | ValueError):
            traceback.print_exc()
            # The owner may not know the type, and not every exception can be pickled.
            error = RuntimeError(f"rank {options.rank}: {type(error).__name__}: {error}")
        with suppress(OSError):
            link.send(error)
        sys.stderr.flush()
        # A normal exit may block in a communicator that waits for a lost peer.
        os._exit(1)


class Pulse:
    """Signs of life to the owner, limited to one per `_SIGN_OF_LIFE_EVERY_S`."""

    def __init__(self, link: Connection) -> None:
        self._link, self._last_s = link, time.monotonic()

    def beat(self) -> None:
        """Send a sign of life if the last one is old enough."""
        if time.monotonic() - self._last_s > _SIGN_OF_LIFE_EVERY_S:
            self._link.send(None)
            self._last_s = time.monotonic()


def _receive(link: Connection, messages: SimpleQueue[Message]) -> None:
    """Queue the owner's messages until it is gone."""
    with suppress(EOFError, OSError):
        while True:
            messages.put(link.recv())


def _deliver(link: Connection, core: EngineCore, number: int, outcome: Outcome) -> None:
    if core.model.shard.rank == 0:
        link.send(Done(number, outcome, core.stats))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
