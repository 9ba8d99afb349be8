"""Turn signals into one orderly stop; a second Ctrl-C ends the process at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOPPED = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_STOP_S = 0.1  # `timeout` signals a process and its group: the second signal is not another Ctrl-C

Handler = Callable[[int, FrameType | None], object]


def leave_when_signalled() -> None:
    """End this process at any signal, with one line instead of a trace, while it has nothing to finish."""
    _install(_leave)


def runs_alone() -> bool:
    """Return whether this process does nothing but run a job, i.e. has called `leave_when_signalled`."""
    return any(signal.getsignal(number) is _leave for number in _SIGNALS)


def leave_with(code: int) -> None:
    """Let this process end with this code after its exit handlers; Ray's libraries would take half a second longer."""
    atexit.register(_leave_with, code)


def _leave_with(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


@contextmanager
def drain_when_signalled() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first signal while in the context; further ones do not disturb what it starts.

    A second Ctrl-C ends this process at once, and with it all processes that it has started.
    """
    previous = _install(_Drain())
    try:
        with _follow_signals():
            yield
    except KeyboardInterrupt:
        if _leave in previous.values():  # the process does nothing else: libraries may hang or crash as they unload
            atexit.register(os._exit, STOPPED)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Drain:
    """A handler that raises KeyboardInterrupt once."""

    def __init__(self) -> None:
        self._is_stopping = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            raise KeyboardInterrupt


@contextmanager
def _follow_signals() -> Iterator[None]:
    """Let a thread follow the signals: the handlers of Python wait until the main thread leaves a library's code."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_leave_at_second_interrupt, args=(reading,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _leave_at_second_interrupt(fd: int) -> None:
    """Read the numbers of this process's signals until the other end is closed."""
    first_s = 0.0
    while numbers := os.read(fd, 1):
        if not first_s and numbers[0] in _SIGNALS:
            first_s = time.monotonic()
            _write("stopping; press Ctrl-C again to stop without waiting")
        elif numbers[0] == signal.SIGINT and time.monotonic() - first_s > _ONE_STOP_S:
            _write("stopped without waiting; run the same command without --overwrite to resume")
            os._exit(STOPPED)


def _install(handler: Handler) -> dict[signal.Signals, signal._HANDLER]:
    """Set the handler for each signal that the caller, such as nohup, does not ignore; return the previous ones."""
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    heeded = {number: before for number, before in previous.items() if before != signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, handler)
    return heeded


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End this process without the exit handlers of libraries, which may wait or print traces."""
    _write("stopped")
    os._exit(STOPPED)


def _write(line: str) -> None:
    """Write a line to stderr. A handler may interrupt a write to the stream, which cannot be entered twice."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"{line}\n".encode())
