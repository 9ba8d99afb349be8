"""References: where the bytes of an image or a video are; stored in manifest rows instead of payload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipelines.errors import MediaError
from pipelines.media.readers import Readers, check_length, read_whole_file
from pipelines.storage import store

_VIDEO_FORMATS = "3gp asf avi f4v flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _VIDEO_FORMATS.split())

Struct = dict[str, Any]
"""One item of the manifest's column `images`."""


class Window(NamedTuple):
    """Part of a video, in seconds from its start: `start_s` up to `stop_s`."""

    start_s: float = 0.0
    stop_s: float = math.inf


class VideoLocation(NamedTuple):
    """Where a video is: a file, or `num_bytes` from `offset` of it, or `data` itself."""

    uri: str
    offset: int = -1
    num_bytes: int = -1
    data: bytes = b""


class ByteRange(NamedTuple):
    """Part of a file, in bytes."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Reference:
    """What all references have. `window` counts for videos."""

    uri: str
    window: Window = field(default=Window(), kw_only=True)

    def _struct(self, kind: str, *, offset: int = -1, num_bytes: int = -1, member: str = "", row: int = -1) -> Struct:
        start_s, stop_s = self.window
        place = {"kind": kind, "uri": self.uri, "offset": offset, "num_bytes": num_bytes, "member": member, "row": row}
        return {**place, "start_s": start_s, "stop_s": stop_s}


@dataclass(frozen=True, slots=True)
class FileRef(_Reference):
    """A whole file. `num_bytes` as listed, -1: unknown."""

    num_bytes: int = -1

    def read(self, readers: Readers, max_bytes: int) -> list[bytes]:
        """Return the bytes of the one image. Raises LongerThanAllowed and other OSErrors."""
        return [read_whole_file(self.uri, max_bytes)]

    def to_struct(self) -> Struct:
        return self._struct("file", num_bytes=self.num_bytes)


@dataclass(frozen=True, slots=True)
class TarRef(_Reference):
    """`num_bytes` from `offset` of a tar, of a tar.gz in its unpacked form; `member` is the name there."""

    offset: int
    num_bytes: int
    member: str
    is_gzip: bool = False

    def read(self, readers: Readers, max_bytes: int) -> list[bytes]:
        """Return the bytes of the one image. Raises OSError."""
        if self.is_gzip:
            data = readers.tar_gz.read(self.uri, self.offset, self.num_bytes, self.member)
        else:
            data = store.read_bytes(self.uri, self.offset, self.offset + self.num_bytes)
        if len(data) != self.num_bytes:
            raise OSError(
                f"{store.redact(self.uri)} ends within {self.member} ({len(data):,} of {self.num_bytes:,} bytes): "
                "it is truncated or has changed since it was listed"
            )
        return [data]

    def to_struct(self) -> Struct:
        kind = "tgz" if self.is_gzip else "tar"
        return self._struct(kind, offset=self.offset, num_bytes=self.num_bytes, member=self.member)


@dataclass(frozen=True, slots=True)
class CellRef(_Reference):
    """All images of one cell, perhaps none. `row` of a Parquet file, or of the Arrow batch that is at `batch`."""

    column: str
    row: int
    batch: ByteRange | None = None

    def read(self, readers: Readers, max_bytes: int) -> list[bytes]:
        """Return the images of a cell of bytes, of a struct of bytes or path, or of a list of either.

        Raises LongerThanAllowed and other OSErrors.
        """
        cell = self._read_cell(readers)
        if not isinstance(cell, list):
            image = self._image_in(cell, max_bytes)
            return [] if image is None else [image]
        images = [self._image_in(value, max_bytes) for value in cell]
        if None in images:
            place = f"row {self.row} of {store.redact(self.uri)}"
            raise OSError(f"image {images.index(None) + 1} of {len(cell)} in {place} is null")
        return [image for image in images if image is not None]

    def _read_cell(self, readers: Readers) -> Any:
        if self.batch is None:
            return readers.parquet.read(self.uri, self.column, self.row)
        return readers.arrow.read(self.uri, self.batch.offset, self.column, self.row)

    def _image_in(self, value: Any, max_bytes: int) -> bytes | None:
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return read_whole_file(resolve_path(value["path"], self.uri), max_bytes)
        return None if data is None else check_length(data, max_bytes)

    def to_struct(self) -> Struct:
        kind, batch = ("arrow", self.batch) if self.batch else ("parquet", ByteRange(-1, -1))
        return self._struct(kind, **batch._asdict(), member=self.column, row=self.row)


ImageRef = FileRef | TarRef | CellRef


def parse_reference(struct: Mapping[str, Any]) -> ImageRef:
    """Return the reference that `to_struct` made `struct` of. Raises ValueError for a kind that is not supported."""
    uri, offset, num_bytes, member = (struct[name] for name in ("uri", "offset", "num_bytes", "member"))
    window = Window(struct["start_s"], struct["stop_s"])
    match struct["kind"]:
        case "file":
            return FileRef(uri, num_bytes, window=window)
        case "tar" | "tgz" as kind:
            return TarRef(uri, offset, num_bytes, member, kind == "tgz", window=window)
        case "parquet":
            return CellRef(uri, member, struct["row"], window=window)
        case "arrow":
            return CellRef(uri, member, struct["row"], ByteRange(offset, num_bytes), window=window)
        case kind:
            raise ValueError(f"references of kind {kind!r} are not supported; was OUTPUT begun by a newer version?")


def get_listed_bytes(image: ImageRef) -> int:
    """Return how many bytes were listed for the image, -1 if unknown."""
    return -1 if isinstance(image, CellRef) else image.num_bytes


def is_sequential(image: ImageRef) -> bool:
    """Return whether what lies before the image is read with it, so that one thread reads all such images."""
    return isinstance(image, CellRef) or (isinstance(image, TarRef) and image.is_gzip)


def is_video(image: ImageRef) -> bool:
    """Return whether the name is a video's. Media without a name are recognized by content when they are read."""
    if isinstance(image, CellRef):
        return False
    name = image.member if isinstance(image, TarRef) else store.strip_query(image.uri)
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def locate(image: ImageRef) -> tuple[str, int]:
    """Return the file and the byte in it where the reference leads, -1 for all of the file."""
    if isinstance(image, CellRef):
        return image.uri, image.batch.offset if image.batch else -1
    return image.uri, image.offset if isinstance(image, TarRef) else -1


def can_read_image(image: ImageRef) -> bool:
    """Return whether the image's store hands out a byte of it now."""
    return store.probe_byte(image.uri, 0 if is_sequential(image) else max(0, locate(image)[1]))


def is_seekable_video(images: Sequence[ImageRef]) -> bool:
    """Return whether the row is one video that need not be fetched: it is a file, or a part of one."""
    return len(images) == 1 and is_video(images[0]) and not is_sequential(images[0])


def locate_video(images: Sequence[ImageRef], encoded: Sequence[bytes]) -> tuple[VideoLocation, Window]:
    """Return the row's video, in place or fetched as `encoded`, and the part of it to sample. Raises MediaError."""
    if len(images) > 1 or len(encoded) > 1:
        raise MediaError("a row holds one video and nothing beside it; make rows of their own of the others")
    if encoded:
        return VideoLocation(images[0].uri, data=encoded[0]), images[0].window
    return VideoLocation(*locate(images[0]), get_listed_bytes(images[0])), images[0].window


def resolve_path(path: str, of_file: str) -> str:
    """Return `path` as given in `of_file`: unchanged if it is a URI or absolute, else relative to that file."""
    if "://" in path or path.startswith("/"):
        return path
    return f"{of_file.rpartition('/')[0]}/{path}"
