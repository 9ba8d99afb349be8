"""Ledger of finished rows: ranges of row numbers, read from the footers that `sink` writes.

Small whatever the number of rows, and independent of blocks, batches, pool sizes and cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import StoreFault
from pipelines.storage import store

FOOTER_KEY = b"ovis.rows"
_THREADS = 32


class RowRange(NamedTuple):
    """Row numbers `start` up to but not including `stop`."""

    start: int
    stop: int


Ranges = tuple[RowRange, ...]
"""Sorted, disjoint, not touching: one form for one set."""


def to_ranges(rows: Iterable[int] | NDArray[np.int64]) -> Ranges:
    """The row numbers, in any order and perhaps repeated, as ranges."""
    numbers = np.unique(np.fromiter(rows, np.int64) if not isinstance(rows, np.ndarray) else rows)
    if not len(numbers):
        return ()
    gaps = np.flatnonzero(np.diff(numbers) > 1)
    starts, stops = numbers[np.r_[0, gaps + 1]], numbers[np.r_[gaps, len(numbers) - 1]] + 1
    return tuple(RowRange(int(a), int(b)) for a, b in zip(starts, stops, strict=True))


def merge_ranges(ranges: Iterable[RowRange]) -> Ranges:
    """Ranges in any order, overlapping or not, as one set."""
    merged: list[RowRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1].stop:
            merged[-1] = RowRange(merged[-1].start, max(stop, merged[-1].stop))
        elif start < stop:
            merged.append(RowRange(start, stop))
    return tuple(merged)


def subtract_ranges(whole: RowRange, done: Ranges) -> Ranges:
    """Return what of `whole` is not in `done`."""
    starts = [whole.start, *(stop for _, stop in done)]
    stops = [*(start for start, _ in done), whole.stop]
    gaps = (RowRange(max(a, whole.start), min(b, whole.stop)) for a, b in zip(starts, stops, strict=True))
    return tuple(gap for gap in gaps if gap.start < gap.stop)


def count_rows(ranges: Iterable[RowRange]) -> int:
    return sum(stop - start for start, stop in ranges)


def split_ranges(ranges: Ranges, size: int) -> Iterator[RowRange]:
    """The same rows in ranges of at most `size`, cut at its multiples so that the cuts do not depend on the gaps."""
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            yield RowRange(start, end)
            start = end


@dataclass(frozen=True)
class FileEntry:
    """What an output file says of itself."""

    ranges: Ranges
    num_errors: int

    def to_json(self) -> str:
        return json.dumps({"ranges": self.ranges, "num_errors": self.num_errors})

    @classmethod
    def from_json(cls, text: str | bytes) -> FileEntry:
        data = json.loads(text)
        return cls(tuple(RowRange(*pair) for pair in data["ranges"]), data["num_errors"])

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row numbers, ascending."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ranges])

    @property
    def file_name(self) -> str:
        """The same rows give the same name; a gap in them shows as a hash after the ends."""
        ends = f"rows-{self.ranges[0].start:012}-{self.ranges[-1].stop:012}"
        digest = hashlib.sha256(repr([tuple(r) for r in self.ranges]).encode()).hexdigest()[:8]
        return f"{ends}{f'-{digest}' if len(self.ranges) > 1 else ''}.parquet"


@dataclass
class Ledger:
    """The rows that OUTPUT/data holds."""

    done: Ranges = ()
    num_errors: int = 0

    @classmethod
    def read(cls, data_uri: str) -> Ledger:
        """From the footers of all files there. Raises ValueError naming a file that is none of ours."""
        entries = [entry for _, entry in read_entries(data_uri)]
        every_range = [r for entry in entries for r in entry.ranges]
        done = merge_ranges(every_range)
        if count_rows(done) < count_rows(every_range):
            raise ValueError(f"files in {data_uri} hold the same rows twice: did two runs write there at once?")
        return cls(done, sum(entry.num_errors for entry in entries))

    def add(self, entry: FileEntry) -> None:
        self.done = merge_ranges([*self.done, *entry.ranges])
        self.num_errors += entry.num_errors

    def find_new(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool[N]: which of the row numbers are not done."""
        if not self.done:
            return np.ones(len(rows), bool)
        starts, stops = np.array(self.done, np.int64).T
        at = np.searchsorted(starts, rows, side="right") - 1
        is_done: NDArray[np.bool_] = (at >= 0) & (rows < stops[at])
        return ~is_done

    def find_missing(self, num_rows: int) -> Ranges:
        return subtract_ranges(RowRange(0, num_rows), self.done)


def read_entries(data_uri: str) -> list[tuple[store.FileInfo, FileEntry]]:
    """All output files there, sorted by name. Raises ValueError naming a file that is none of ours."""
    infos = [info for info in store.list_files(data_uri) if info.uri.endswith(".parquet")]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(zip(infos, pool.map(lambda info: _read_entry(info.uri), infos), strict=True))


def _read_entry(uri: str) -> FileEntry:
    try:
        with store.open_file(uri) as file:
            return FileEntry.from_json((pq.read_metadata(file).metadata or {})[FOOTER_KEY])
    except StoreFault:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # this machine cannot read it now, such as with too many files open; damage has no number
        raise ValueError(f"{uri} is not an output file of this tool ({error!r}); move it away and run again") from error
