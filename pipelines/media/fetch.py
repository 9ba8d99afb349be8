"""Fetch the bytes of references several rows ahead, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pipelines.errors import CredentialsRefused, StoreFault
from pipelines.media.readers import LongerThanAllowed, Readers
from pipelines.media.reference import ImageRef, get_listed_bytes, is_sequential

T = TypeVar("T")


class Fetcher:
    """A pool of threads that fetches the images of rows; one further thread reads sequential containers in order.

    max_at_once       rows fetched at once: object stores answer slowly and in parallel
    max_ahead_bytes   of all rows that are not due yet. A row of unknown size counts as an equal share of it, and no
                      more than that share is read ahead
    max_image_bytes   of all images of a row together
    """

    def __init__(
        self, *, max_at_once: int = 16, max_ahead_bytes: int = 256 << 20, max_image_bytes: int = 256 << 20
    ) -> None:
        self._max_at_once, self._max_ahead_bytes = max_at_once, max_ahead_bytes
        self._max_image_bytes, self._share_bytes = max_image_bytes, max_ahead_bytes // max_at_once
        self._pool = ThreadPoolExecutor(max_at_once, thread_name_prefix="fetch")
        self._sequential_pool = ThreadPoolExecutor(1, thread_name_prefix="fetch-in-order")
        self._readers = Readers()

    def fetch_ahead(self, rows: Iterable[tuple[T, Sequence[ImageRef]]]) -> Iterator[tuple[T, PendingImages]]:
        """Yield each row, in order, with its images, which are fetched ahead up to the limits on rows and bytes."""
        waiting: deque[tuple[T, PendingImages]] = deque()
        for row, images in rows:
            while waiting and self._is_full(images, waiting):
                yield waiting.popleft()
            waiting.append((row, self.submit(images)))
        while waiting:
            yield waiting.popleft()

    def submit(self, images: Sequence[ImageRef]) -> PendingImages:
        """Start to fetch the images of a row, up to the limit on bytes ahead."""
        is_listed = all(get_listed_bytes(image) >= 0 for image in images)
        return PendingImages(self, images, self._start(images, is_ahead=True), self._estimate_bytes(images), is_listed)

    def fetch(self, images: Sequence[ImageRef]) -> list[bytes]:
        """Fetch the images of a row completely and return their bytes. Raise OSError if one cannot be read."""
        return self._start(images, is_ahead=False).result()

    def _start(self, images: Sequence[ImageRef], *, is_ahead: bool) -> Future[list[bytes]]:
        is_ordered = any(map(is_sequential, images))
        return (self._sequential_pool if is_ordered else self._pool).submit(self._fetch, images, is_ahead)

    def _fetch(self, images: Sequence[ImageRef], is_ahead: bool) -> list[bytes]:
        found: list[bytes] = []
        try:
            for image in images:
                self._check_size(get_listed_bytes(image))
                max_bytes = max(self._share_bytes, get_listed_bytes(image)) if is_ahead else self._max_image_bytes
                found += image.read(self._readers, max_bytes)
                self._check_size(sum(map(len, found)))
            return found
        except LongerThanAllowed as error:
            self._check_size(error.num_bytes)
            raise
        except CredentialsRefused as error:  # no other file of this store can be read either
            raise StoreFault(str(error)) from error
        except (OSError, StoreFault):
            raise
        except Exception as error:
            # A URI may be any text, and each store's client raises its own exceptions: only this row may fail.
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _check_size(self, num_bytes: int) -> None:
        limit = self._max_image_bytes
        if num_bytes > limit:
            raise OSError(f"the images of the row have at least {num_bytes:,} bytes, over the limit of {limit:,}")

    def _is_full(self, images: Sequence[ImageRef], waiting: Collection[tuple[T, PendingImages]]) -> bool:
        if len(waiting) == self._max_at_once:  # first: to add up the bytes takes a tenth of a small row's time
            return True
        waiting_bytes = sum(pending.num_bytes for _, pending in waiting)
        return waiting_bytes + self._estimate_bytes(images) > self._max_ahead_bytes

    def _estimate_bytes(self, images: Sequence[ImageRef]) -> int:
        return sum(size if size >= 0 else self._share_bytes for size in map(get_listed_bytes, images))


@dataclass(frozen=True)
class PendingImages:
    """The images of a row that are being fetched."""

    _fetcher: Fetcher
    _images: Sequence[ImageRef]
    _future: Future[list[bytes]]
    _expected_bytes: int
    _is_listed: bool  # then the expected bytes are those of the listing, which need no look at the future

    @property
    def num_bytes(self) -> int:
        """The bytes that the images take in memory, an estimate until they are fetched."""
        if not self._is_listed and self._future.done() and self._future.exception() is None:
            return sum(map(len, self._future.result()))
        return self._expected_bytes

    def result(self) -> list[bytes]:
        """Wait and return the bytes of all images, in order. Raise OSError if one of them cannot be read."""
        try:
            return self._future.result()
        except LongerThanAllowed:  # than its share of the bytes ahead; as its row is due now, all may be read
            return self._fetcher.fetch(self._images)
