"""Stream the rows of a TSV file with images in its cells: one row in memory at a time, and where each row is."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_ROW_BYTES = 2**28


@dataclass(frozen=True)
class TsvRow:
    """The cells of a row, and the bytes [start, stop) of the file that hold it."""

    cells: Sequence[str]
    start: int
    stop: int


def stream_rows(path: str | Path) -> Iterator[TsvRow]:
    """Yield the rows of a TSV file, its header first; blank lines are skipped.

    Raise ValueError if the file is not UTF-8 or has a row of more than MAX_ROW_BYTES, OSError if it cannot be read.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    with Path(path).open("rb") as file:
        lines, start = _Lines(file), 0
        reader = csv.reader(lines, delimiter="\t")
        try:
            for cells in reader:
                if cells:
                    yield TsvRow(cells, start, lines.num_bytes)
                start = lines.num_bytes
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path} as a TSV file, after byte {start}: {error}") from error


@dataclass
class _Lines:
    """The lines of a file as text, counting the bytes that were read."""

    file: io.BufferedReader
    num_bytes: int = 0
    _encoding: str = field(default="utf-8-sig", init=False)

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(MAX_ROW_BYTES):
            if len(line) == MAX_ROW_BYTES:
                raise csv.Error(f"a line of more than {MAX_ROW_BYTES} bytes")
            self.num_bytes += len(line)
            yield line.decode(self._encoding)
            self._encoding = "utf-8"
