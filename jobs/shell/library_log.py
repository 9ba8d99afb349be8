"""Keep what libraries print and log off the user's stderr, in a file that a failed job names."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from jobs.shell.streams import LossyStream


class LibraryLog:
    """What libraries wrote so far; `file` is an unnamed file, None if they write to the user's stderr."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file = file

    def save(self) -> Path | None:
        """Copy the log to a named file in the temporary directory -> its path; None if nothing was written."""
        if self._file is None or not (text := os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)):
            return None
        with suppress(OSError), tempfile.NamedTemporaryFile(prefix="ovis2-", suffix=".log", delete=False) as named:
            named.write(text)
            return Path(named.name)
        return None


@contextmanager
def divert_libraries(our_packages: Sequence[str]) -> Iterator[LibraryLog]:
    """Split stderr while in the context: lines of our packages go to it, those of libraries to the LibraryLog.

    C libraries write to descriptor 2, which becomes the log; warnings and log records of libraries follow it. Call it
    only in a process that does nothing but run a job. Without a temporary directory, stderr stays whole.
    """
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
    except OSError:
        yield LibraryLog()
        return
    with file:
        terminal, ours = os.dup(2), sys.stderr
        sys.stderr = LossyStream(terminal, ours.encoding)
        os.dup2(file.fileno(), 2)
        handlers = _make_handlers(our_packages)
        logging.captureWarnings(True)
        for handler in handlers:
            logging.root.addHandler(handler)
        try:
            yield LibraryLog(file)
        finally:
            logging.captureWarnings(False)
            for handler in handlers:
                logging.root.removeHandler(handler)
            os.dup2(terminal, 2)
            sys.stderr = ours
            os.close(terminal)


def _make_handlers(our_packages: Sequence[str]) -> tuple[logging.Handler, logging.Handler]:
    """Return a handler for records of our packages, to sys.stderr, and one for the others, to descriptor 2."""
    ours, others = logging.StreamHandler(sys.stderr), logging.StreamHandler(LossyStream(2, "utf-8"))
    ours.addFilter(lambda record: record.name.partition(".")[0] in our_packages)
    others.addFilter(lambda record: record.name.partition(".")[0] not in our_packages)
    others.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    return ours, others
