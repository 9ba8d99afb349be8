"""Run a module in a child process that talks over a private socket and ends with its parent.

multiprocessing is not used, because it imports the caller's main module again, with all its side effects. The socket
pair needs no port and no name.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_WATCH_EVERY_S = 0.5
_LENGTH = struct.Struct("!Q")
_MAX_BUFFERS = 512  # per call; the system allows 1,024

Json = dict[str, Any]


class ChildProcess(subprocess.Popen[bytes]):
    """A running `python -m MODULE FD PARENT ARGUMENTS...`.

    FD is the child's end of `socket`; PARENT is the id of this process.
    """

    def __init__(
        self, module: str, *arguments: object, environment: Mapping[str, str] | None = None, stdout: Any = None
    ) -> None:
        """Start the process; `environment` is added to this process's variables."""
        self.socket, theirs = socket.socketpair()
        with theirs:
            super().__init__(
                [sys.executable, "-P", "-m", module, *map(str, (theirs.fileno(), os.getpid(), *arguments))],
                env={**os.environ, **(environment or {}), "PYTHONPATH": _search_path()},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> None:
        """Kill the process and wait until it has ended."""
        self.socket.close()
        self.kill()
        self.wait()


class StreamEnded(Exception):  # noqa: N818
    """The other side has closed the socket."""


class MessageStream:
    """Messages over a socket: a length, JSON of that length, then bytes whose sizes are in the JSON."""

    def __init__(self, connection: socket.socket, deadline_s: float = float("inf")) -> None:
        self._connection, self._deadline_s = connection, deadline_s

    def send(self, message: Json, *payloads: Any) -> None:
        """Send a message. Raise TimeoutError at the deadline, ConnectionError if the other side has closed."""
        views = [memoryview(payload) for payload in payloads]
        data = json.dumps({**message, "num_bytes": [view.nbytes for view in views]}).encode()
        head = memoryview(_LENGTH.pack(len(data)) + data)
        self._send_all([head, *(view.cast("B") for view in views if view.nbytes)])

    def _send_all(self, views: list[memoryview]) -> None:
        while views:
            self._wait()
            sent = self._connection.sendmsg(views[:_MAX_BUFFERS])
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if sent:
                views[0] = views[0][sent:]

    def receive_json(self) -> Json:
        """Return the next message; `receive` its bytes then. Raise as `receive` does."""
        (length,) = _LENGTH.unpack(self.receive([_LENGTH.size]).tobytes())
        message: Json = json.loads(self.receive([length]).tobytes())
        return message

    def receive(self, shape: Sequence[int]) -> np.ndarray:
        """Return uint8 of this shape. Raise TimeoutError at the deadline, StreamEnded if the other side closes."""
        array = np.empty(shape, np.uint8)
        view = array.reshape(-1).data
        while view.nbytes:
            self._wait()
            if not (count := self._connection.recv_into(view)):
                raise StreamEnded
            view = view[count:]
        return array

    def _wait(self) -> None:
        if self._deadline_s < float("inf"):
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)


def end_with_parent(parent: int, clean_up: Callable[[], None] = lambda: None) -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent is gone, after calling `clean_up`.

    A thread watches the parent, because a killed parent cannot end a child that is busy.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_EVERY_S)
        clean_up()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _search_path() -> str:
    """Return this process's module path; this package comes first, so that an installed copy never takes its place."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
