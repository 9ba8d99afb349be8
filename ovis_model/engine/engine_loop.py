"""The one loop that steps an engine: in a thread of the caller's process, or as the main thread of each rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ovis_model.engine.calls import Abandon, Calls, Inbox, Message, Outcome, Stats, WarmUp
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.request_state import RequestState
from ovis_model.types import EngineDied, RequestError


@dataclass
class _RunningCall:
    """The requests of one call; the first `num_left` have finished or failed."""

    number: int
    states: Sequence[RequestState]
    num_left: int = 0

    @property
    def is_done(self) -> bool:
        while self.num_left < len(self.states) and self.states[self.num_left].has_left:
            self.num_left += 1
        return self.num_left == len(self.states)

    def outcome(self) -> Outcome:
        try:
            return [state.completion() for state in self.states]
        except RequestError as error:
            return error


class EngineLoop:
    """Takes in messages and steps. Requests of several calls run side by side."""

    def __init__(self, core: EngineCore, inbox: Inbox, deliver: Callable[[int, Outcome], None]) -> None:
        self._core, self._inbox, self._deliver = core, inbox, deliver
        self._running: list[_RunningCall] = []

    def run(self) -> None:
        """Return when the inbox is closed. Raise the first fault of the engine."""
        while True:
            if not self._running:
                self._inbox.wait()  # in all ranks, so that none of them waits for the others while there is no work
            if self._inbox.is_closed:
                return
            for message in self._inbox.take(self._core.agree_on_arrivals(self._inbox.num_arrived)):
                self._take_in(message)
            self._core.step()
            self._deliver_done()

    def _take_in(self, message: Message) -> None:
        if isinstance(message, Abandon):
            self._core.abandon()
        elif isinstance(message, WarmUp):
            self._core.warm_up()
            self._deliver(message.number, [])
        else:
            try:
                states = self._core.enqueue(message.requests, message.params)
            except Exception as error:  # whatever a caller hands in concerns no other caller
                self._deliver(message.number, error)
            else:
                self._running.append(_RunningCall(message.number, states))

    def _deliver_done(self) -> None:
        for call in [call for call in self._running if call.is_done]:
            self._running.remove(call)
            self._deliver(call.number, call.outcome())


class LoopThread:
    """An engine in this process: its loop in a daemon thread, which waits without using the CPU."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._inbox = Inbox()
        self.calls = Calls(self._inbox.put)
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> Stats:
        return self.core.stats

    def describe(self) -> str:
        return self.core.describe()

    def rebuild(self) -> bool:
        """Return False: a lost device stays lost to this process."""
        return False

    def close(self) -> None:
        """End the thread after its present step. Calls raise EngineDied from then on."""
        self._inbox.close()
        if self._thread is not threading.current_thread():  # a garbage collection may run anywhere
            self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        if self.core.model.device.type == "cuda":
            torch.cuda.set_device(self.core.model.device)  # threads begin with the first device
        try:
            EngineLoop(self.core, self._inbox, self.calls.settle).run()
        except Exception as fault:  # the state of all requests is unknown now
            self.calls.fail(fault)
        self.calls.fail(EngineDied("the engine is closed"))
