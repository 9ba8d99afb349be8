"""Read images from containers in order: gzip, Parquet, Arrow streams."""

from __future__ import annotations

import gzip
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa

from pipelines.errors import CredentialsRefused, StoreFault, TableError
from pipelines.storage import store
from pipelines.storage.retries import Retries, is_final
from pipelines.storage.table_reader import ArrowTable, ParquetTable, get_processes

_RETRIES = Retries(max_attempts=2)  # per cell: damage looks like a fault of the store, which itself retries more
_CELLS_AT_ONCE = 16  # of Parquet, whose cells are unpacked in pieces of so many; small ones travel together
_MAX_CELLS = 1024  # of Arrow, whose cells are mapped: those that travel together
_BLOCK_BYTES = 4 << 20


class LongerThanAllowed(OSError):  # noqa: N818  (the name says what happened)
    """An image has more bytes than may be read now; `num_bytes` is the number read so far."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"an image has at least {num_bytes:,} bytes")
        self.num_bytes = num_bytes


def read_whole_file(uri: str, max_bytes: int) -> bytes:
    """Read a whole file in one bounded request. Raise LongerThanAllowed if it has more than `max_bytes`."""
    return check_length(store.read_bytes(uri, 0, max_bytes + 1), max_bytes)


def check_length(data: bytes, max_bytes: int) -> bytes:
    """Return `data` if it has at most `max_bytes`, else raise LongerThanAllowed."""
    if len(data) > max_bytes:
        raise LongerThanAllowed(len(data))
    return data


class Readers:
    """The files that a Fetcher keeps open between images, for use by one thread."""

    def __init__(self) -> None:
        self.gzip, self.parquet, self.arrow = GzipReader(), ParquetReader(), ArrowReader()


class GzipReader:
    """One file in gzip, unpacked up to the last image read; an earlier image needs unpacking from the start again."""

    def __init__(self) -> None:
        self._uri = ""
        self._file: Any = None

    def read(self, uri: str, offset: int, num_bytes: int, name: str) -> bytes:
        """Return bytes of the unpacked stream, fewer if it ends early. Raise OSError if it is damaged."""
        if self._uri != uri:
            self._close()
            self._file = gzip.GzipFile(fileobj=store.open_file(uri, block_bytes=_BLOCK_BYTES))
            self._uri = uri
        try:
            self._file.seek(offset)
            data: bytes = self._file.read(num_bytes)
            return data
        except (OSError, EOFError, zlib.error) as error:
            self._close()
            if isinstance(error, OSError):
                raise
            raise OSError(f"{store.redact(uri)} is damaged before the end of {name}: {error}") from error

    def _close(self) -> None:
        if self._file is not None:
            self._file.fileobj.close()
        self._uri, self._file = "", None


_Group = tuple[str, str, int]
"""One column of a row group in a Parquet file: (URI, column name, group number)."""


class ParquetReader:
    """One column of one row group, read forward a few cells at a time; an earlier cell needs a new start."""

    def __init__(self) -> None:
        self._uri = ""
        self._file: ParquetTable | None = None
        self._starts: list[int] = []  # the first row of each row group
        self._group: _Group | None = None
        self._stream: Iterator[Any] = iter(())
        self._first, self._cells = 0, pa.nulls(0)  # the cells in memory and the row number of the first
        self._broken: tuple[_Group | None, int] = (None, 0)  # group and row; later rows fail without another try

    def read(self, uri: str, column: str, row: int) -> Any:
        """Return the cell as a Python value; retry once if reading fails. Raise OSError if it fails again."""
        for attempt in range(1, _RETRIES.max_attempts + 1):
            try:
                self._select_group(uri, column, row, skips=attempt == 1)  # the second finds where the damage begins
                if self._is_broken and row >= self._broken[1]:
                    raise OSError(f"its row group cannot be read from row {self._broken[1]} on")
                self._advance(row)
                return self._cells[row - self._first].as_py()
            except (StoreFault, CredentialsRefused):
                self._close()
                raise
            except (TableError, OSError, StopIteration) as error:
                if (
                    attempt == _RETRIES.max_attempts
                    or self._is_broken
                    or (isinstance(error, OSError) and is_final(error))
                ):
                    self._broken = (self._group, self._first)
                    raise OSError(f"row {row} of {store.redact(uri)} cannot be read: {_describe(error)}") from error
                self._close()
                time.sleep(_RETRIES.compute_pause_s(attempt))
        raise AssertionError("unreachable")

    @property
    def _is_broken(self) -> bool:
        return self._broken[0] == self._group

    def _advance(self, row: int) -> None:
        while row >= self._first + len(self._cells):
            self._first += len(self._cells)
            self._cells = pa.nulls(0)
            assert self._group is not None
            at, self._cells = next(self._stream)
            self._first = self._starts[self._group[2]] + at

    def _select_group(self, uri: str, column: str, row: int, *, skips: bool) -> None:
        if self._file is None or uri != self._uri:
            self._file = self._open(uri)
        number = bisect_right(self._starts, row) - 1
        if not 0 <= number < len(self._starts) - 1:
            raise OSError("the file has changed since it was listed")
        group = (uri, column, number)
        if group != self._group or row < self._first:
            first = row - self._starts[number] if skips else 0
            self._stream = self._file.iter_cells(column, _CELLS_AT_ONCE, number, first)
            self._group, self._first, self._cells = group, self._starts[number], pa.nulls(0)

    def _open(self, uri: str) -> ParquetTable:
        self._close()
        file = get_processes().open_parquet(uri, _BLOCK_BYTES)
        self._starts, self._uri = [0, *accumulate(file.num_rows)], uri
        return file

    def _close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
        self._uri, self._file, self._group = "", None, None


class ArrowReader:
    """One column of one batch of an Arrow stream: memory-mapped if the file is local, else read by one request."""

    def __init__(self) -> None:
        self._uri = ""
        self._file: ArrowTable | None = None
        self._batch: tuple[str, int, str] | None = None
        self._first, self._cells = 0, pa.nulls(0)  # the cells in memory and the number of the first in its batch

    def read(self, uri: str, offset: int, column: str, row: int) -> Any:
        """Return a cell of the batch at byte `offset` as a Python value. Raise OSError if it cannot be read."""
        try:
            if self._batch != (uri, offset, column) or not 0 <= row - self._first < len(self._cells):
                self._batch = None
                self._cells = self._select_file(uri).read_cells(offset, column, row, _MAX_CELLS)
                self._batch, self._first = (uri, offset, column), row
            return self._cells[row - self._first].as_py()
        except (TableError, IndexError) as error:
            self._close()
            raise OSError(f"row {row} of the batch at byte {offset:,} cannot be read: {error}") from error

    def _select_file(self, uri: str) -> ArrowTable:
        if self._file is None or uri != self._uri:
            self._close()
            self._file, self._uri = get_processes().open_arrow(uri), uri
        return self._file

    def _close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = None


def _describe(error: Exception) -> str:
    return "the file has fewer rows than when it was listed" if isinstance(error, StopIteration) else str(error)
