"""INPUT -> items, listed once and without reading any payload."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

from pipelines import store
from pipelines.store import FileInfo

_IMAGE_FORMATS = "avif bmp dib gif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _IMAGE_FORMATS.split())
_SHARD_SUFFIXES = frozenset([".tar", ".tgz", ".parquet", ".jsonl"])
_GLOB_CHARACTERS = frozenset("*?[")

logger = logging.getLogger(__name__)


class SourceError(ValueError):
    """An INPUT that cannot be listed, and what to do about it."""


@dataclass(frozen=True)
class Item:
    """One row to be: its identity, where its image is, and why it cannot be read if that is known already."""

    id: str
    uri: str
    num_bytes: int
    error: str = ""


def list_items(inputs: Iterable[str], limit: int | None = None) -> list[Item]:
    """The rows of all inputs, in order. Raises SourceError if there are none or if two share an id."""
    try:
        items = list(islice((item for uri in inputs for item in _list_input(uri)), limit))
    except OSError as error:
        raise SourceError(f"cannot list {', '.join(inputs)}: {error}") from error
    if not items:
        raise SourceError(f"no images in {', '.join(inputs)}: looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    _check_unique(items)
    return items


def _list_input(uri: str) -> Iterator[Item]:
    if info := store.find_file(uri):
        return iter([_item(_only_image(info))])
    if store.is_directory(uri):
        return map(_item, _images_below(uri))
    if _GLOB_CHARACTERS & set(uri):
        return map(_item, map(_only_image, store.glob_files(uri)))
    raise SourceError(f"input {uri!r} does not exist")


def _only_image(info: FileInfo) -> FileInfo:
    """A file that is named is taken whatever it is called, unless it holds many rows."""
    if PurePosixPath(info.uri).suffix.lower() in _SHARD_SUFFIXES:
        raise SourceError(f"{info.uri}: shards (tar, Parquet, JSONL) are not supported yet; give image files")
    return info


def _images_below(uri: str) -> Iterator[FileInfo]:
    """The files of a directory that are named as images; the others are counted and told."""
    others: Counter[str] = Counter()
    for info in store.list_files(uri):
        suffix = PurePosixPath(info.uri).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            yield info
        else:
            others[suffix or "no suffix"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning("%s: left out %d files that are not named as images (%s)", uri, others.total(), counts)


def _item(info: FileInfo) -> Item:
    try:
        info.uri.encode()
    except UnicodeEncodeError:
        # Bytes that are no UTF-8 cannot be stored in a column of text, and no other spelling would open the file.
        uri = info.uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return Item(uri, uri, info.num_bytes, "the file name is not UTF-8; rename the file")
    error = "" if info.is_regular else "not a regular file"
    return Item(info.uri, info.uri, info.num_bytes, error)


def _check_unique(items: list[Item]) -> None:
    counts = Counter(item.id for item in items)
    if len(counts) < len(items):
        repeated = [f"{id_} ({n} times)" for id_, n in counts.most_common(10) if n > 1]
        raise SourceError(
            f"{len(items) - len(counts)} rows repeat an id; list each file once. The most frequent: "
            + ", ".join(repeated)
        )
