"""Run the loop that steps an engine: in a thread of this process, or in the main thread of each rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from ovis_model.engine.calls import Abandon, Call, Calls, Close, Message, Outcome, Stats, WarmUp
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.requests import RequestState
from ovis_model.types import Completion, ConstraintExhausted, EngineDied, RequestError


@dataclass
class _RunningCall:
    """The requests of one call; the first `num_left` have finished or failed."""

    number: int
    states: Sequence[RequestState]
    num_left: int = 0

    def is_done(self) -> bool:
        """Return whether all requests have finished or failed; each is checked only once after that."""
        while self.num_left < len(self.states) and self.states[self.num_left].has_left:
            self.num_left += 1
        return self.num_left == len(self.states)

    def collect_outcome(self) -> Outcome:
        outcomes = [_make_outcome(state) for state in self.states]
        completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
        if errors and all(isinstance(error, ConstraintExhausted) for error in errors):
            exhausted = ConstraintExhausted(str(errors[0]))
            exhausted.outcomes = outcomes
            return exhausted
        return errors[0] if errors else completions


def _make_outcome(state: RequestState) -> Completion | RequestError:
    try:
        return state.make_completion()
    except RequestError as error:
        return error


class EngineLoop:
    """A loop that processes messages and steps the engine. Requests of several calls run together."""

    def __init__(
        self, core: EngineCore, messages: SimpleQueue[Message], deliver: Callable[[int, Outcome], None]
    ) -> None:
        self._core, self._messages, self._deliver = core, messages, deliver
        self._running: list[_RunningCall] = []
        self._num_received = 0

    def run(self) -> None:
        """Step until a `Close` message arrives. Raise the first fault of the engine."""
        while self._process_arrived():
            self._core.step()
            self._deliver_done()

    def _process_arrived(self) -> bool:
        """Process the messages that have arrived; return False at a `Close`."""
        for message in self._receive_messages():
            if isinstance(message, Close):
                return False
            self._process(message)
        return True

    def _receive_messages(self) -> list[Message]:
        """Return the messages that have arrived at rank 0; wait for one if there is no work."""
        # All ranks run out of work at the same step, so no rank waits here while another needs it.
        messages = [] if self._running else [self._messages.get()]
        num_arrived = self._num_received + len(messages) + self._messages.qsize()
        num_missing = self._core.agree_on_arrivals(num_arrived) - self._num_received - len(messages)
        messages += [self._messages.get() for _ in range(num_missing)]
        self._num_received += len(messages)
        return messages

    def _process(self, message: Message) -> None:
        match message:
            case Abandon():
                self._core.abandon()
            case WarmUp():
                self._core.warm_up()
                self._deliver(message.number, [])
            case Call():
                try:
                    states = self._core.enqueue(message.requests, message.params)
                    self._running.append(_RunningCall(message.number, states))
                except Exception as error:  # an invalid call must not affect other callers
                    self._deliver(message.number, error)

    def _deliver_done(self) -> None:
        for call in [call for call in self._running if call.is_done()]:
            self._running.remove(call)
            self._deliver(call.number, call.collect_outcome())


class LoopThread:
    """An engine in this process, whose loop is a daemon thread that waits without using the CPU."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self.calls = Calls(self._messages.put)
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> Stats:
        """Totals so far, which the loop updates."""
        return self.core.stats

    def describe(self) -> str:
        """Describe the device and the engine's limits in one line."""
        return self.core.describe()

    def rebuild(self) -> bool:
        """Return False, because this process can never use a lost device again."""
        return False

    def close(self) -> None:
        """End the thread after the current step. Later calls raise EngineDied."""
        self._messages.put(Close())
        if self._thread is not threading.current_thread():  # garbage collection may call this in any thread
            self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # MKL has a separate setting for each thread
        if self.core.model.device.type == "cuda":
            torch.cuda.set_device(self.core.model.device)  # a new thread uses the first device
        try:
            EngineLoop(self.core, self._messages, self.calls.settle).run()
        except Exception as fault:  # the state of all requests is unknown after a fault
            self.calls.fail(fault)
        self.calls.fail(EngineDied("the engine is closed"))
