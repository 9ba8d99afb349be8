"""Run a module in a child process that talks over a private socket and ends with its parent.

multiprocessing is not used, because it imports the caller's main module again, with all its side effects. The socket
pair needs no port and no name.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_WATCH_EVERY_S = 0.5


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
