"""Files of images and videos, each of them a row."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

from pipelines.media.reference import VIDEO_SUFFIXES, FileRef
from pipelines.sources.rows import Chunk, Columns, Row, chunks_of, text_of_name
from pipelines.storage import store
from pipelines.storage.store import FileInfo

_IMAGE_FORMATS = "avif bmp dib gif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _IMAGE_FORMATS.split()) | VIDEO_SUFFIXES
"""Of files that are images or become some: the frames of a video."""

logger = logging.getLogger(__name__)


def list_files(infos: Iterable[FileInfo], columns: Columns) -> Iterator[Chunk]:
    """List one row per file; files have no columns, so kept columns are null."""
    return chunks_of(map(_row, infos), columns.keep)


def log_left_out(uri: str, others: Counter[str]) -> None:
    """Log what was left out; `others` counts files by the end of their names."""
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning("%s: left out %d files (%s)", store.shown(uri), others.total(), counts)


def _row(info: FileInfo) -> Row:
    if (uri := text_of_name(info.uri)) != info.uri:  # and no other spelling would open the file
        return Row(uri, uri, error="the file name is not UTF-8; rename the file")
    error = "" if info.is_regular else "not a regular file"
    return Row(info.uri, info.uri, (FileRef(info.uri, info.num_bytes),), error=error)
