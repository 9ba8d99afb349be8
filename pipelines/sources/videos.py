"""Rows of videos: which references are videos, windows `uri#t=10,20` of them, and long ones cut into several rows."""

from __future__ import annotations

import logging
import os
import queue
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa

from pipelines.errors import MediaError
from pipelines.media.reference import ImageRef
from pipelines.media.video import Window
from pipelines.media.video_process import Video, VideoDecoder
from pipelines.sources.files import VIDEO_SUFFIXES
from pipelines.sources.rows import Chunk, Row
from pipelines.storage import store

MAX_WINDOWS = 100_000  # of one video: a header that promises more is wrong
_HEADER_TIMEOUT_S = 60
_FRAGMENT = re.compile(r"#t=(?:npt:)?(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?")  # Media Fragments URI 1.0, in seconds

logger = logging.getLogger(__name__)


def is_video(image: ImageRef) -> bool:
    """By its name; of a URL, without its query. What has no name is seen by its content when it is read."""
    suffix = PurePosixPath(image.member or store.name_of(image.uri)).suffix.lower()
    return image.kind in ("file", "tar", "tgz") and suffix in VIDEO_SUFFIXES


def is_in_place(images: Sequence[ImageRef]) -> bool:
    """One video that need not be fetched: it is a file, or a part of one."""
    return len(images) == 1 and is_video(images[0]) and images[0].kind in ("file", "tar")


def video_of(images: Sequence[ImageRef], encoded: Sequence[bytes]) -> tuple[Video, Window]:
    """The row's video, in place or fetched as `encoded`, and the part of it that is meant. Raises MediaError."""
    if len(images) > 1 or len(encoded) > 1:
        raise MediaError("a row holds one video and nothing beside it; make rows of their own of the others")
    place, data = images[0], encoded[0] if encoded else b""
    return Video(place.uri, place.offset, place.num_bytes, data), Window(place.start_s, place.stop_s)


def without_window(uri: str) -> str:
    """`uri` of a video without `#t=...`."""
    base, mark, _ = uri.partition("#t=")
    return base if mark and is_video(ImageRef("file", base)) else uri


def with_windows(chunks: Iterable[Chunk], window_s: float | None) -> Iterator[Chunk]:
    """The same rows, `#t=start,stop` behind the URI of a video read; with `window_s`, long videos are several rows.

    Those are cut into windows of so many seconds, the last of them up to half as long again or shorter. Only then are
    the videos opened, for their length. One whose length cannot be told stays one row: it fails, if it does, when it
    is decoded. A row that is cut has ids `id#t=start,stop`; the last window is open, so nothing is lost behind a
    length that is told too short.
    """
    parsed = (replace(chunk, rows=[_with_window(row) for row in chunk.rows]) for chunk in chunks)
    if window_s is None:
        yield from parsed
        return
    with _lengths() as lengths_of:
        for chunk in parsed:
            yield _cut(chunk, window_s, lengths_of(chunk.rows))


def _with_window(row: Row) -> Row:
    if not any("#t=" in image.uri for image in row.images):
        return row
    try:
        return replace(row, images=tuple(map(_parsed, row.images)))
    except ValueError as error:
        return replace(row, error=row.error or str(error))


def _parsed(image: ImageRef) -> ImageRef:
    base = without_window(image.uri)
    if base == image.uri or image.kind != "file":
        return image
    match = _FRAGMENT.fullmatch(image.uri[len(base) :])
    if match is None or match.groups() == (None, None):
        raise ValueError(f"{image.uri[len(base) :]!r} is no window in seconds, such as #t=10,20 or #t=10")
    start_s, stop_s = float(match[1] or 0), float(match[2] or "inf")
    if not start_s < stop_s:
        raise ValueError(f"the window {image.uri[len(base) :]} ends before it starts")
    return image._replace(uri=base, start_s=start_s, stop_s=stop_s)


def _cut(chunk: Chunk, window_s: float, lengths_s: list[float | None]) -> Chunk:
    cut = [_windows(row, window_s, length_s) for row, length_s in zip(chunk.rows, lengths_s, strict=True)]
    origins = [number for number, rows in enumerate(cut) for _ in rows]
    kept = None if chunk.kept is None else chunk.kept.take(pa.array(origins, pa.int64()))
    return replace(chunk, rows=[row for rows in cut for row in rows], kept=kept)


def _windows(row: Row, window_s: float, length_s: float | None) -> list[Row]:
    if length_s is None:
        return [row]
    whole = row.images[0]
    stop_s = min(whole.stop_s, length_s)
    count = max(1, round((stop_s - whole.start_s) / window_s))
    if count > MAX_WINDOWS:
        return [replace(row, error=f"{length_s:g} s are more than {MAX_WINDOWS:,} windows; its header is wrong?")]
    starts = [whole.start_s + i * window_s for i in range(count)]
    return (
        [_window(row, *ends) for ends in zip(starts, [*starts[1:], whole.stop_s], strict=True)] if count > 1 else [row]
    )


def _window(row: Row, start_s: float, stop_s: float) -> Row:
    fragment = f"#t={_seconds(start_s)}" + (f",{_seconds(stop_s)}" if stop_s < float("inf") else "")
    image = row.images[0]
    uri = f"{image.uri}{fragment}" if image.kind == "file" else row.uri
    return replace(
        row,
        id=f"{without_window(row.id)}{fragment}",
        uri=uri,
        images=(image._replace(start_s=start_s, stop_s=stop_s),),
    )


def _seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


class _Lengths:
    """Reads the headers of videos, several at once, each in a process that can be ended."""

    def __init__(self, at_once: int) -> None:
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="video-length")
        self._decoders: queue.SimpleQueue[VideoDecoder] = queue.SimpleQueue()
        for _ in range(at_once):
            self._decoders.put(VideoDecoder(timeout_s=_HEADER_TIMEOUT_S))
        self.num_unknown = 0

    def __call__(self, rows: Iterable[Row]) -> list[float | None]:
        """Seconds; None for what is no video or cannot be told."""
        return list(self._pool.map(self._length_s, rows))

    def _length_s(self, row: Row) -> float | None:
        if row.error or len(row.images) != 1 or not is_video(row.images[0]):
            return None
        image = row.images[0]
        if image.kind == "tgz":
            self.num_unknown += 1
            return None
        decoder = self._decoders.get()
        try:
            return decoder.duration_s(Video(image.uri, image.offset, image.num_bytes))
        except (MediaError, OSError):
            self.num_unknown += 1
            return None
        finally:
            self._decoders.put(decoder)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        while not self._decoders.empty():
            self._decoders.get().close()
        if self.num_unknown:
            logger.warning("%d videos are not cut: their length cannot be told", self.num_unknown)


@contextmanager
def _lengths() -> Iterator[_Lengths]:
    lengths = _Lengths(min(8, 2 * (os.cpu_count() or 1)))
    try:
        yield lengths
    finally:
        lengths.close()
