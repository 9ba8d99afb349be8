"""Parse windows of videos such as `clip.mp4#t=10,20`, and cut long videos into several rows."""

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

MAX_WINDOWS = 100_000  # per video; a header that implies more is wrong
_HEADER_TIMEOUT_S = 60
_FRAGMENT = re.compile(r"#t=(?:npt:)?(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?")  # Media Fragments URI 1.0, in seconds

logger = logging.getLogger(__name__)


def strip_window(uri: str) -> str:
    """Remove `#t=...` from the `uri` of a video."""
    base, mark, _ = uri.partition("#t=")
    return base if mark and is_video(FileRef(base)) else uri


def apply_windows(chunks: Iterable[Chunk], window_s: float | None) -> Iterator[Chunk]:
    """Parse `#t=start,stop` in the URIs of videos; with `window_s`, cut each video into rows of so many seconds.

    The last window is 0.5 to 1.5 times as long. Only with `window_s` are videos opened here, to read their duration. A
    video of unknown duration stays one row; if it is damaged, that row fails when it is decoded. The rows of a cut
    video have ids `id#t=start,stop`. The last window is open, so a header that states too short a duration loses
    nothing.
    """
    parsed = (replace(chunk, rows=[_parse_row(row) for row in chunk.rows]) for chunk in chunks)
    if window_s is None:
        yield from parsed
        return
    with closing(_DurationReader(min(8, 2 * (os.cpu_count() or 1)))) as read_durations_s:
        for chunk in parsed:
            yield _cut_chunk(chunk, window_s, read_durations_s(chunk.rows))


def _parse_row(row: SourceRow) -> SourceRow:
    if not any("#t=" in image.uri for image in row.images):
        return row
    try:
        return replace(row, images=tuple(map(_parse_image, row.images)))
    except ValueError as error:
        return replace(row, error=row.error or str(error))


def _parse_image(image: ImageRef) -> ImageRef:
    base = strip_window(image.uri)
    if base == image.uri or not isinstance(image, FileRef):
        return image
    match = _FRAGMENT.fullmatch(image.uri[len(base) :])
    if match is None or match.groups() == (None, None):
        raise ValueError(f"{image.uri[len(base) :]!r} is not a window in seconds; write e.g. #t=10,20 or #t=10")
    start_s, stop_s = float(match[1] or 0), float(match[2] or "inf")
    if not start_s < stop_s:
        raise ValueError(f"the window {image.uri[len(base) :]} ends before it starts")
    return replace(image, uri=base, window=Window(start_s, stop_s))


def _cut_chunk(chunk: Chunk, window_s: float, durations_s: list[float | None]) -> Chunk:
    pieces = [_cut_row(row, window_s, duration_s) for row, duration_s in zip(chunk.rows, durations_s, strict=True)]
    origins = [number for number, rows in enumerate(pieces) for _ in rows]
    kept = None if chunk.kept is None else chunk.kept.take(pa.array(origins, pa.int64()))
    return replace(chunk, rows=[row for rows in pieces for row in rows], kept=kept)


def _cut_row(row: SourceRow, window_s: float, duration_s: float | None) -> list[SourceRow]:
    if duration_s is None:
        return [row]
    whole = row.images[0].window
    stop_s = min(whole.stop_s, duration_s)
    count = max(1, round((stop_s - whole.start_s) / window_s))
    if count > MAX_WINDOWS:
        return [replace(row, error=f"{duration_s:g} s make more than {MAX_WINDOWS:,} windows; is its header wrong?")]
    if count == 1:
        return [row]
    starts = [whole.start_s + i * window_s for i in range(count)]
    return [_make_window_row(row, Window(*ends)) for ends in zip(starts, [*starts[1:], whole.stop_s], strict=True)]


def _make_window_row(row: SourceRow, window: Window) -> SourceRow:
    start_s, stop_s = window
    fragment = f"#t={_format_seconds(start_s)}" + (f",{_format_seconds(stop_s)}" if stop_s < float("inf") else "")
    image = replace(row.images[0], window=window)
    uri = f"{image.uri}{fragment}" if isinstance(image, FileRef) else row.uri
    return replace(row, id=f"{strip_window(row.id)}{fragment}", uri=uri, images=(image,))


def _format_seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


class _DurationReader:
    """Threads that read durations from the headers of videos, each with a decoder process that can be killed."""

    def __init__(self, num_decoders: int) -> None:
        self._pool = ThreadPoolExecutor(num_decoders, thread_name_prefix="video-duration")
        self._decoders: queue.SimpleQueue[VideoDecoder] = queue.SimpleQueue()
        for _ in range(num_decoders):
            self._decoders.put(VideoDecoder(timeout_s=_HEADER_TIMEOUT_S))
        self.num_unknown = 0

    def __call__(self, rows: Iterable[SourceRow]) -> list[float | None]:
        """Return the duration of each row in seconds; None if it is unknown or the row is not one video."""
        return list(self._pool.map(self._read_duration_s, rows))

    def _read_duration_s(self, row: SourceRow) -> float | None:
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
        """Stop the threads and decoders, and log the number of videos of unknown duration."""
        self._pool.shutdown(cancel_futures=True)
        while not self._decoders.empty():
            self._decoders.get().close()
        if self.num_unknown:
            logger.warning("%d videos are not cut: their duration is unknown", self.num_unknown)
