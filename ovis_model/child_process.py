"""Child processes of this Python: each runs a module, talks over a private socket and ends with its parent.

Not multiprocessing: it would import the caller's main module again, whatever that does. No port and no name is shared.
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
    """`python -m MODULE FD PARENT ARGUMENTS...`; FD is its end of `socket`, PARENT the id of this process."""

    def __init__(
        self, module: str, *arguments: object, environment: Mapping[str, str] | None = None, stdout: Any = None
    ) -> None:
        """`environment` adds to that of this process."""
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
        """End the process and wait for it."""
        self.socket.close()
        self.kill()
        self.wait()


def end_with_parent(parent: int, clean_up: Callable[[], None] = lambda: None) -> None:
    """Have this process ignore Ctrl-C, which is for its parent, and end when the parent is gone.

    A parent that was killed cannot end a child in the middle of its work. `clean_up` is called before the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_EVERY_S)
        clean_up()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _search_path() -> str:
    """Return this process's module path, the present package first whatever is installed."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
