"""References to images -> their bytes: whole files, ranges of a tar, an unpacked tar.gz, cells of a Parquet file."""

from __future__ import annotations

import gzip
import time
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import StoreFault
from pipelines.media.reference import ImageRef, resolve
from pipelines.storage import store
from pipelines.storage.arrow_ipc import read_batch, read_schema
from pipelines.storage.retries import is_final, pause_s

AT_ONCE = 16  # files on their way at once: object stores answer slowly and in parallel
MAX_IMAGE_BYTES = 256 << 20  # of all images of a row together
AHEAD_BYTES = 256 << 20  # of rows that are not due yet; one whose size is unknown counts and is read as a share of it
_SHARE_BYTES = AHEAD_BYTES // AT_ONCE
_CELLS_AT_ONCE = 16
_TRIES = 2  # of a cell: damage looks like a fault of the store, whose own retries lie below
_BLOCK_BYTES = 4 << 20
_IN_ORDER = ("tgz", "parquet", "arrow")

T = TypeVar("T")


class Fetcher:
    """Fetches the images of rows. What has to be read in order is, by one thread, in the order of the rows."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch")
        self._in_order = ThreadPoolExecutor(1, thread_name_prefix="fetch-in-order")
        self._unpacked = _UnpackedTar()
        self._cells = _ParquetCells()
        self._batch = _ArrowBatch()

    def ahead(self, rows: Iterable[tuple[T, Sequence[ImageRef]]]) -> Iterator[tuple[T, Pending]]:
        """What stands for each row, in order, with the bytes of its images; a bounded number and bytes ahead."""
        waiting: deque[tuple[T, Pending]] = deque()
        for row, images in rows:
            while waiting and _is_full(images, waiting):
                yield waiting.popleft()
            waiting.append((row, self.submit(images)))
        while waiting:
            yield waiting.popleft()

    def submit(self, images: Sequence[ImageRef]) -> Pending:
        return Pending(self, images, self._start(images, ahead=True))

    def fetch(self, images: Sequence[ImageRef]) -> list[bytes]:
        """Now and whole. Raises OSError."""
        return self._start(images, ahead=False).result()

    def _start(self, images: Sequence[ImageRef], *, ahead: bool) -> Future[list[bytes]]:
        in_order = any(image.kind in _IN_ORDER for image in images)
        return (self._in_order if in_order else self._pool).submit(self._fetch, images, ahead)

    def _fetch(self, images: Sequence[ImageRef], ahead: bool) -> list[bytes]:
        found: list[bytes] = []
        try:
            for image in images:
                most_bytes = max(_SHARE_BYTES, _listed_bytes(image)) if ahead else MAX_IMAGE_BYTES
                found += self._bytes(image, most_bytes)
                _check_size(sum(map(len, found)))
            return found
        except (OSError, StoreFault):
            raise
        except Exception as error:
            # A URI may be anything, and each store's client has exceptions of its own: one row's fault, not the run's.
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _bytes(self, image: ImageRef, most_bytes: int) -> list[bytes]:
        """Raises LongerThanShare if there are more than `most_bytes` that nobody knew of."""
        if image.kind != "arrow":  # there it is the batch that is as large
            _check_size(image.num_bytes)
        match image.kind:
            case "file":
                return [_read_file(image.uri, most_bytes)]
            case "tar":
                return [_exactly(image, store.read_bytes(image.uri, image.offset, image.offset + image.num_bytes))]
            case "tgz":
                return [_exactly(image, self._unpacked.read(image))]
            case "parquet":
                return list(_images_in(self._cells.read(image), image, most_bytes))
            case "arrow":
                return list(_images_in(self._batch.read(image), image, most_bytes))


class LongerThanShare(OSError):  # noqa: N818  (the name says what happened)
    """Of an image that was read ahead; when its row is due it is read whole."""


@dataclass(frozen=True)
class Pending:
    """The images of a row, on their way."""

    _fetcher: Fetcher
    _images: Sequence[ImageRef]
    _future: Future[list[bytes]]

    @property
    def num_bytes(self) -> int:
        """What they take of the memory, or will as far as is known."""
        if self._future.done() and self._future.exception() is None:
            return sum(map(len, self._future.result()))
        return _bytes_ahead(self._images)

    def result(self) -> list[bytes]:
        """The bytes of all images, in order. Raises OSError if one of them cannot be read."""
        try:
            return self._future.result()
        except LongerThanShare:
            return self._fetcher.fetch(self._images)


def _is_full(images: Sequence[ImageRef], waiting: Collection[tuple[T, Pending]]) -> bool:
    waiting_bytes = sum(pending.num_bytes for _, pending in waiting)
    return len(waiting) == AT_ONCE or waiting_bytes + _bytes_ahead(images) > AHEAD_BYTES


def _bytes_ahead(images: Sequence[ImageRef]) -> int:
    return sum(_listed_bytes(image) if _listed_bytes(image) >= 0 else _SHARE_BYTES for image in images)


def _listed_bytes(image: ImageRef) -> int:
    """-1: unknown. Of an Arrow batch the size says nothing of a row's."""
    return -1 if image.kind == "arrow" else image.num_bytes


def _read_file(uri: str, most_bytes: int) -> bytes:
    """One request, bounded whatever was listed."""
    data = store.read_bytes(uri, 0, most_bytes + 1)
    _check_length(len(data), most_bytes)
    return data


def _check_length(num_bytes: int, most_bytes: int) -> None:
    _check_size(num_bytes)
    if num_bytes > most_bytes:
        raise LongerThanShare


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise OSError(f"the images of the row have {num_bytes:,} bytes or more, over the limit of {MAX_IMAGE_BYTES:,}")


def _exactly(image: ImageRef, data: bytes) -> bytes:
    if len(data) != image.num_bytes:
        raise OSError(
            f"{store.shown(image.uri)} ends within {image.member} ({len(data):,} of {image.num_bytes:,} bytes): "
            "it is truncated or has changed since it was listed"
        )
    return data


class _UnpackedTar:
    """One tar.gz, unpacked as far as the last image read; a step back unpacks it from the start again."""

    def __init__(self) -> None:
        self._uri = ""
        self._file: Any = None

    def read(self, image: ImageRef) -> bytes:
        if self._uri != image.uri:
            self._close()
            self._file = gzip.GzipFile(fileobj=store.open_file(image.uri, block_bytes=_BLOCK_BYTES))
            self._uri = image.uri
        try:
            self._file.seek(image.offset)
            data: bytes = self._file.read(image.num_bytes)
            return data
        except (EOFError, zlib.error) as error:
            self._close()
            raise OSError(f"{store.shown(image.uri)} is damaged before the end of {image.member}: {error}") from error
        except OSError:
            self._close()
            raise

    def _close(self) -> None:
        if self._file is not None:
            self._file.fileobj.close()
        self._uri, self._file = "", None


class _ParquetCells:
    """One column of one row group, read forward some cells at a time; a step back reads the group again."""

    def __init__(self) -> None:
        self._open: Any = None
        self._place: tuple[str, str, int] = ("", "", -1)
        self._stream: Iterator[Any] = iter(())
        self._first, self._cells = 0, pa.nulls(0)  # the cells at hand and the row of the first of them
        self._parquet: Any = None
        self._uri = ""
        self._broken: tuple[Any, int] = (None, 0)  # where a row group cannot be read on: tried once, not for each row

    def read(self, image: ImageRef) -> Any:
        """The cell as Python has it. Raises OSError; a fault of the store is tried again."""
        for attempt in range(1, _TRIES + 1):
            try:
                self._turn_to(image)
                if self._broken[0] == self._place and image.row >= self._broken[1]:
                    raise OSError(f"its row group cannot be read from row {self._broken[1]} on")
                self._advance(image.row)
                return self._cells[image.row - self._first].as_py()
            except StoreFault:
                self._forget()
                raise
            except (pa.ArrowException, OSError, StopIteration) as error:
                is_known = self._broken[0] == self._place
                if attempt == _TRIES or is_known or (isinstance(error, OSError) and is_final(error)):
                    self._broken = (self._place, self._first)
                    raise OSError(f"row {image.row} of {store.shown(image.uri)} cannot be read: {error!r}") from error
                self._forget()
                time.sleep(pause_s(attempt))
        raise AssertionError("unreachable")

    def _advance(self, row: int) -> None:
        while row >= self._first + len(self._cells):
            self._first += len(self._cells)
            self._cells = pa.nulls(0)
            self._cells = next(self._stream).column(0)

    def _forget(self) -> None:
        """So that the next read opens the file again."""
        if self._open is not None:
            self._open.close()
        self._open, self._uri, self._place = None, "", ("", "", -1)

    def _turn_to(self, image: ImageRef) -> None:
        self._turn_to_file(image.uri)
        metadata = self._parquet.metadata
        starts = [0, *accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))]
        group = bisect_right(starts, image.row) - 1
        place = (image.uri, image.member, group)
        if not 0 <= group < metadata.num_row_groups:
            raise OSError("the file has changed since it was listed")
        if place != self._place or image.row < self._first:
            self._stream = self._parquet.iter_batches(_CELLS_AT_ONCE, row_groups=[group], columns=[image.member])
            self._place, self._first, self._cells = place, starts[group], pa.nulls(0)

    def _turn_to_file(self, uri: str) -> None:
        if uri != self._uri:
            self._forget()
            self._open = store.open_file(uri, block_bytes=_BLOCK_BYTES)
            self._parquet = pq.ParquetFile(self._open, buffer_size=store.PARQUET_BUFFER_BYTES, pre_buffer=False)
            self._uri = uri


class _ArrowBatch:
    """The images of one batch of an Arrow stream: of a local file they are where the file is, else one request."""

    def __init__(self) -> None:
        self._place: tuple[str, int] = ("", -1)
        self._cells: Any = None

    def read(self, image: ImageRef) -> Any:
        """The cell as Python has it. Raises OSError."""
        try:
            if self._place != (image.uri, image.offset):
                self._place, self._cells = ("", -1), None
                self._cells = self._read_batch(image)
                self._place = (image.uri, image.offset)
            return self._cells[image.row].as_py()
        except (pa.ArrowException, EOFError, IndexError) as error:
            raise OSError(f"row {image.row} of the batch at byte {image.offset:,} cannot be read: {error}") from error

    def _read_batch(self, image: ImageRef) -> Any:
        with store.map_file(image.uri) as file:
            schema = read_schema(file)
            file.seek(image.offset)
            return read_batch(pa.ipc.read_message(file), schema, [image.member]).column(0)


def _images_in(cell: Any, image: ImageRef, most_bytes: int) -> Iterator[bytes]:
    """Of bytes, a struct of bytes or path, a list of either, or nothing."""
    if cell is None:
        return
    for number, value in enumerate(cell if isinstance(cell, list) else [cell], 1):
        data = _image_of(value, image, most_bytes)
        if data is not None:
            yield data
        elif isinstance(cell, list):
            raise OSError(f"image {number} of {len(cell)} in row {image.row} of {store.shown(image.uri)} is null")


def _image_of(value: Any, image: ImageRef, most_bytes: int) -> bytes | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return _read_file(resolve(value["path"], image.uri), most_bytes)
    if data is not None:
        _check_length(len(data), most_bytes)
    return data
