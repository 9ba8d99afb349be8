"""Parse windows of videos such as `clip.mp4#t=10,20`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipelines.media.reference import FileRef, ImageRef, Window, is_video
from pipelines.sources.rows import Chunk, SourceRow

_FRAGMENT = re.compile(r"#t=(?:npt:)?(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?")  # Media Fragments URI 1.0, in seconds


def strip_window(uri: str) -> str:
    """Remove `#t=...` from the `uri` of a video."""
    base, mark, _ = uri.partition("#t=")
    return base if mark and is_video(FileRef(base)) else uri


def parse_windows(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks with `#t=start,stop` in the URIs of videos parsed; a wrong one makes an error row."""
    for chunk in chunks:
        yield replace(chunk, rows=[_parse_row(row) for row in chunk.rows]) if chunk.rows else chunk


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
