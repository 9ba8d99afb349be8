"""Keep standard streams from stopping a job: closed ones, broken pipes, full disks, encodings other than UTF-8."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import asdict
from typing import Any


class LossyStream(io.TextIOWrapper):
    """A text stream over a descriptor that drops what cannot be written or encoded; `lost` is the last reason."""

    lost: OSError | None = None

    def __init__(self, fd: int, encoding: str) -> None:
        raw: Any = open(fd, "wb", buffering=0, closefd=False)  # noqa: SIM115  (a standard stream stays open)
        super().__init__(raw, encoding, errors="backslashreplace", write_through=True)

    def write(self, text: str) -> int:
        """Write `text` at once, if possible; return its length."""
        try:
            return super().write(text)
        except OSError as error:
            self.lost = error
            return len(text)

    def flush(self) -> None:
        """Do what `write` has done already."""
        try:
            super().flush()
        except OSError as error:
            self.lost = error


def open_streams() -> None:
    """Replace stdout and stderr by lossy streams, unless a calling program has replaced them.

    A descriptor that the shell has closed is opened on the null device; else the next file to be opened would get its
    number, and with it what is printed.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `fd`
    if sys.stdout is sys.__stdout__:
        sys.stdout = LossyStream(1, getattr(sys.stdout, "encoding", "utf-8"))
    if sys.stderr is sys.__stderr__:
        sys.stderr = LossyStream(2, getattr(sys.stderr, "encoding", "utf-8"))


def print_last_line(report: Any) -> None:
    """Print a dataclass as one line of JSON, in ASCII if stdout cannot encode it, to stderr if it cannot be written."""
    line = json.dumps(asdict(report), ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(asdict(report))
    print(line, flush=True)
    if lost := getattr(sys.stdout, "lost", None):
        print(f"the last line could not be written to stdout ({lost.strerror}): {line}", file=sys.stderr)
