"""Videos as rows: windows such as `clip.mp4#t=10,20`, and long videos cut into several rows."""

from __future__ import annotations

import logging
import os
import queue
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pyarrow as pa

from pipelines.errors import MediaError
from pipelines.media.reference import FileRef, ImageRef, Window, is_seekable_video, is_video, locate_video
from pipelines.media.video_process import VideoDecoder
from pipelines.sources.rows import Chunk, SourceRow

MAX_WINDOWS = 100_000  # of one video: a header that promises more is wrong
_HEADER_TIMEOUT_S = 60
_FRAGMENT = re.compile(r"#t=(?:npt:)?(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?")  # Media Fragments URI 1.0, in seconds

logger = logging.getLogger(__name__)


def strip_window(uri: str) -> str:
    """Return the `uri` of a video without `#t=...`."""
    base, mark, _ = uri.partition("#t=")
    return base if mark and is_video(FileRef(base)) else uri


def apply_windows(chunks: Iterable[Chunk], window_s: float | None) -> Iterator[Chunk]:
    """Yield the rows with `#t=start,stop` of a video's URI parsed; with `window_s`, long videos become several rows.

    Those are cut into windows of so many seconds, the last of them up to half as long again or shorter. Only then are
    the videos opened, for their length. One whose length cannot be told stays one row: it fails, if it does, when it
    is decoded. A row that is cut has ids `id#t=start,stop`; the last window is open, so nothing is lost behind a
    length that is told too short.
    """
    parsed = (replace(chunk, rows=[_with_window(row) for row in chunk.rows]) for chunk in chunks)
    if window_s is None:
        yield from parsed
        return
    with closing(_Lengths(min(8, 2 * (os.cpu_count() or 1)))) as lengths_of:
        for chunk in parsed:
            yield _cut(chunk, window_s, lengths_of(chunk.rows))


def _with_window(row: SourceRow) -> SourceRow:
    if not any("#t=" in image.uri for image in row.images):
        return row
    try:
        return replace(row, images=tuple(map(_parsed, row.images)))
    except ValueError as error:
        return replace(row, error=row.error or str(error))


def _parsed(image: ImageRef) -> ImageRef:
    base = strip_window(image.uri)
    if base == image.uri or not isinstance(image, FileRef):
        return image
    match = _FRAGMENT.fullmatch(image.uri[len(base) :])
    if match is None or match.groups() == (None, None):
        raise ValueError(f"{image.uri[len(base) :]!r} is no window in seconds, such as #t=10,20 or #t=10")
    start_s, stop_s = float(match[1] or 0), float(match[2] or "inf")
    if not start_s < stop_s:
        raise ValueError(f"the window {image.uri[len(base) :]} ends before it starts")
    return replace(image, uri=base, window=Window(start_s, stop_s))


def _cut(chunk: Chunk, window_s: float, lengths_s: list[float | None]) -> Chunk:
    cut = [_windows(row, window_s, length_s) for row, length_s in zip(chunk.rows, lengths_s, strict=True)]
    origins = [number for number, rows in enumerate(cut) for _ in rows]
    kept = None if chunk.kept is None else chunk.kept.take(pa.array(origins, pa.int64()))
    return replace(chunk, rows=[row for rows in cut for row in rows], kept=kept)


def _windows(row: SourceRow, window_s: float, length_s: float | None) -> list[SourceRow]:
    if length_s is None:
        return [row]
    whole = row.images[0].window
    stop_s = min(whole.stop_s, length_s)
    count = max(1, round((stop_s - whole.start_s) / window_s))
    if count > MAX_WINDOWS:
        return [replace(row, error=f"{length_s:g} s are more than {MAX_WINDOWS:,} windows; its header is wrong?")]
    if count == 1:
        return [row]
    starts = [whole.start_s + i * window_s for i in range(count)]
    return [_window(row, Window(*ends)) for ends in zip(starts, [*starts[1:], whole.stop_s], strict=True)]


def _window(row: SourceRow, window: Window) -> SourceRow:
    start_s, stop_s = window
    fragment = f"#t={_seconds(start_s)}" + (f",{_seconds(stop_s)}" if stop_s < float("inf") else "")
    image = replace(row.images[0], window=window)
    uri = f"{image.uri}{fragment}" if isinstance(image, FileRef) else row.uri
    return replace(row, id=f"{strip_window(row.id)}{fragment}", uri=uri, images=(image,))


def _seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


class _Lengths:
    """Durations of videos by their headers, several read at once, each in a process that can be ended."""

    def __init__(self, at_once: int) -> None:
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="video-length")
        self._decoders: queue.SimpleQueue[VideoDecoder] = queue.SimpleQueue()
        for _ in range(at_once):
            self._decoders.put(VideoDecoder(timeout_s=_HEADER_TIMEOUT_S))
        self.num_unknown = 0

    def __call__(self, rows: Iterable[SourceRow]) -> list[float | None]:
        """Return the duration of each row in seconds; None if it is not a video or unknown."""
        return list(self._pool.map(self._length_s, rows))

    def _length_s(self, row: SourceRow) -> float | None:
        if row.error or len(row.images) != 1 or not is_video(row.images[0]):
            return None
        if not is_seekable_video(row.images):
            self.num_unknown += 1
            return None
        decoder = self._decoders.get()
        try:
            return decoder.read_duration_s(locate_video(row.images, [])[0])
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
