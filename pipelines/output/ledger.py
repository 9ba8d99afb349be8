"""The ledger of finished rows: ranges of row numbers, read from the footers that `sink` writes.

It stays small for any number of rows and does not depend on blocks, batches, pool sizes or the cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import StoreFault
from pipelines.storage import store

FOOTER_KEY = b"ovis.rows"
_THREADS = 32


class RowRange(NamedTuple):
    """The row numbers `[start, stop)`."""

    start: int
    stop: int


Ranges = tuple[RowRange, ...]
"""Sorted ranges that neither overlap nor touch, so that each set of rows has one form."""


def to_ranges(rows: Iterable[int] | NDArray[np.int64]) -> Ranges:
    """Return row numbers as ranges. They may be in any order and repeat."""
    numbers = np.unique(np.fromiter(rows, np.int64) if not isinstance(rows, np.ndarray) else rows)
    if not len(numbers):
        return ()
    gaps = np.flatnonzero(np.diff(numbers) > 1)
    starts, stops = numbers[np.r_[0, gaps + 1]], numbers[np.r_[gaps, len(numbers) - 1]] + 1
    return tuple(RowRange(int(a), int(b)) for a, b in zip(starts, stops, strict=True))


def merge_ranges(ranges: Iterable[RowRange]) -> Ranges:
    """Return the rows of all ranges, which may be in any order and overlap."""
    merged: list[RowRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1].stop:
            merged[-1] = RowRange(merged[-1].start, max(stop, merged[-1].stop))
        elif start < stop:
            merged.append(RowRange(start, stop))
    return tuple(merged)


def subtract_ranges(whole: RowRange, done: Ranges) -> Ranges:
    """Return the rows of `whole` that are not in `done`."""
    starts = [whole.start, *(stop for _, stop in done)]
    stops = [*(start for start, _ in done), whole.stop]
    gaps = (RowRange(max(a, whole.start), min(b, whole.stop)) for a, b in zip(starts, stops, strict=True))
    return tuple(gap for gap in gaps if gap.start < gap.stop)


def count_rows(ranges: Iterable[RowRange]) -> int:
    """Return the number of rows in ranges; a row in two ranges counts twice."""
    return sum(stop - start for start, stop in ranges)


def split_ranges(ranges: Ranges, size: int) -> Iterator[RowRange]:
    """Yield the same rows in ranges of at most `size`, cut at multiples of it so that gaps do not move the cuts."""
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            yield RowRange(start, end)
            start = end


def drop_rows(ranges: Ranges, count: int) -> Ranges:
    """Return ranges without their first `count` rows."""
    ends = [0, *accumulate(stop - start for start, stop in ranges)]
    starts = (start + max(0, count - end) for (start, _), end in zip(ranges, ends, strict=False))
    left = (RowRange(first, stop) for first, (_, stop) in zip(starts, ranges, strict=True))
    return tuple(found for found in left if found.start < found.stop)


def _place_ranges(ranges: Ranges, pieces: Ranges) -> Ranges:
    """Return the place in a whole of rows that are numbered along its `pieces`."""
    placed, first = [], 0
    for start, stop in pieces:
        shift, end = start - first, first + stop - start
        cut = (RowRange(max(a, first) + shift, min(b, end) + shift) for a, b in ranges)
        placed += [found for found in cut if found.start < found.stop]
        first = end
    return merge_ranges(placed)


@dataclass(frozen=True)
class FileEntry:
    """The footer of an output file: which rows it holds and how many of them are error rows."""

    ranges: Ranges
    num_errors: int

    def to_json(self) -> str:
        """Return the text that the footer stores."""
        return json.dumps({"ranges": self.ranges, "num_errors": self.num_errors})

    @classmethod
    def from_json(cls, text: str | bytes) -> FileEntry:
        """Parse the text that the footer stores."""
        data = json.loads(text)
        return cls(tuple(RowRange(*pair) for pair in data["ranges"]), data["num_errors"])

    def place(self, pieces: Ranges) -> FileEntry:
        """Return the entry with the numbers that its rows have in a whole, of which the rows are `pieces`, in order."""
        return FileEntry(_place_ranges(self.ranges, pieces), self.num_errors) if pieces else self

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row numbers, ascending."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ranges])

    @property
    def file_name(self) -> str:
        """The name of a file with these rows: `start` and `stop`, and a hash if rows between them are missing."""
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
        """Read the footers of all files. Raise ValueError if a file is not an output file or two files share rows."""
        entries = [entry for _, entry in read_entries(data_uri)]
        every_range = [r for entry in entries for r in entry.ranges]
        done = merge_ranges(every_range)
        if count_rows(done) < count_rows(every_range):
            raise ValueError(
                f"files in {data_uri} hold the same rows twice, as if two runs wrote there at once; use another OUTPUT"
            )
        return cls(done, sum(entry.num_errors for entry in entries))

    def add(self, entry: FileEntry) -> None:
        """Record the rows of a new file as done."""
        self.done = merge_ranges([*self.done, *entry.ranges])
        self.num_errors += entry.num_errors

    def find_new(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return bool[N]: which of the row numbers are not done."""
        if not self.done:
            return np.ones(len(rows), bool)
        starts, stops = np.array(self.done, np.int64).T
        at = np.searchsorted(starts, rows, side="right") - 1
        is_done: NDArray[np.bool_] = (at >= 0) & (rows < stops[at])
        return ~is_done

    def find_missing(self, num_rows: int) -> Ranges:
        """Return the rows of a manifest of `num_rows` that are not done."""
        return subtract_ranges(RowRange(0, num_rows), self.done)


def read_entries(data_uri: str) -> list[tuple[store.FileInfo, FileEntry]]:
    """Read the footers of all output files, sorted by name. Raise ValueError for a file that is not an output file."""
    infos = [info for info in store.list_files(data_uri) if info.uri.endswith(".parquet")]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(zip(infos, pool.map(lambda info: _read_entry(info.uri), infos), strict=True))


def read_data_schema(data_uri: str) -> pa.Schema:
    """Return the columns of the first output file; an empty schema if there is none."""
    uris = [info.uri for info in store.list_files(data_uri) if info.uri.endswith(".parquet")]
    if not uris:
        return pa.schema([])
    with store.open_file(uris[0]) as file:
        return pq.read_schema(file)


def _read_entry(uri: str) -> FileEntry:
    try:
        with store.open_file(uri) as file:
            return FileEntry.from_json((pq.read_metadata(file).metadata or {})[FOOTER_KEY])
    except StoreFault:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # e.g. too many open files: a temporary fault of this machine. Damaged files have no errno
        raise ValueError(f"{uri} is not an output file of this tool ({error!r}); move it away and run again") from error
