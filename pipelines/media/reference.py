"""Refer to the bytes of images and videos; manifest rows store references instead of payload."""

from __future__ import annotations

import json
import math
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ovis_model.wording import count_nouns
from pipelines.errors import MediaError
from pipelines.media.inline import decode_inline, is_inline
from pipelines.media.readers import Readers, check_length, read_whole_file
from pipelines.storage import store

_VIDEO_FORMATS = "3gp asf avi f4v flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _VIDEO_FORMATS.split())

Struct = dict[str, Any]
"""One item of the manifest's column `images`."""


class Window(NamedTuple):
    """Part of a video, [`start_s`, `stop_s`) in seconds from its start."""

    start_s: float = 0.0
    stop_s: float = math.inf


class VideoLocation(NamedTuple):
    """Location of a video: a whole file, `num_bytes` of a file from `offset`, or the bytes in `data`."""

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
    """The fields of every reference; `window` only applies to videos."""

    uri: str
    window: Window = field(default=Window(), kw_only=True)

    def _make_struct(
        self, kind: str, *, offset: int = -1, num_bytes: int = -1, member: str = "", row: int = -1
    ) -> Struct:
        start_s, stop_s = self.window
        place = {"kind": kind, "uri": self.uri, "offset": offset, "num_bytes": num_bytes, "member": member, "row": row}
        return {**place, "start_s": start_s, "stop_s": stop_s}


@dataclass(frozen=True, slots=True)
class FileRef(_Reference):
    """A whole file; `num_bytes` as listed, -1 if unknown."""

    num_bytes: int = -1

    def read(self, readers: Readers, max_bytes: int) -> list[bytes]:
        """Return [bytes of the image]. Raise LongerThanAllowed or another OSError if it cannot be read."""
        return [read_whole_file(self.uri, max_bytes)]

    def to_struct(self) -> Struct:
        """Convert the reference to an item of the manifest's column `images`."""
        return self._make_struct("file", num_bytes=self.num_bytes)


@dataclass(frozen=True, slots=True)
class TarRef(_Reference):
    """A tar member named `member`: `num_bytes` from `offset`, counted in the unpacked form of a tar.gz."""

    offset: int
    num_bytes: int
    member: str
    is_gzip: bool = False

    def read(self, readers: Readers, max_bytes: int) -> list[bytes]:
        """Return [bytes of the image]. Raise OSError if it cannot be read or the tar has changed."""
        if self.is_gzip:
            data = readers.gzip.read(self.uri, self.offset, self.num_bytes, self.member)
        else:
            data = store.read_bytes(self.uri, self.offset, self.offset + self.num_bytes)
        if len(data) != self.num_bytes:
            size = count_nouns(self.num_bytes, "byte")
            raise OSError(
                f"{store.redact(self.uri)} ends within {self.member} ({len(data):,} of {size}): "
                "it is truncated or has changed since it was listed"
            )
        return [data]

    def to_struct(self) -> Struct:
        """Convert the reference to an item of the manifest's column `images`."""
        kind = "tgz" if self.is_gzip else "tar"
        return self._make_struct(kind, offset=self.offset, num_bytes=self.num_bytes, member=self.member)


@dataclass(frozen=True, slots=True)
class CellRef(_Reference):
    """The images of one cell, possibly none, in `row` of a Parquet file or of the Arrow batch at `batch`."""

    column: str
    row: int
    batch: ByteRange | None = None

    def read(self, readers: Readers, max_bytes: int) -> list[bytes]:
        """Return the images of a cell of bytes, of text (inline or a path), of a struct of both, or of a list of these.

        Raise LongerThanAllowed or another OSError if one cannot be read.
        """
        cell = self._read_cell(readers)
        if not isinstance(cell, list):
            image = self._extract_image(cell, max_bytes)
            return [] if image is None else [image]
        images = [self._extract_image(value, max_bytes) for value in cell]
        if None in images:
            place = f"row {self.row} of {store.redact(self.uri)}"
            raise OSError(f"image {images.index(None) + 1} of {len(cell)} in {place} is null")
        return [image for image in images if image is not None]

    def _read_cell(self, readers: Readers) -> Any:
        if self.batch is None:
            return readers.parquet.read(self.uri, self.column, self.row)
        return readers.arrow.read(self.uri, self.batch.offset, self.column, self.row)

    def _extract_image(self, value: Any, max_bytes: int) -> bytes | None:
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):
            data, path = (None, data) if value is data else (decode_inline(data, max_bytes), None)
        if data is None and path:
            return self._read_path(path, max_bytes)
        return None if data is None else check_length(getattr(data, "bytes", data), max_bytes)  # a UUID is bytes too

    def _read_path(self, path: str, max_bytes: int) -> bytes:
        if is_inline(path):
            return decode_inline(path, max_bytes)
        return read_whole_file(resolve_path(path, self.uri), max_bytes)

    def to_struct(self) -> Struct:
        """Convert the reference to an item of the manifest's column `images`."""
        kind, batch = ("arrow", self.batch) if self.batch else ("parquet", ByteRange(-1, -1))
        return self._make_struct(kind, **batch._asdict(), member=self.column, row=self.row)


@dataclass(frozen=True, slots=True)
class InlineRef(_Reference):
    """A JSON string that holds an image as text: `num_bytes` from `offset`, counted in the unpacked form of a .gz."""

    offset: int
    num_bytes: int
    is_gzip: bool = False

    def read(self, readers: Readers, max_bytes: int) -> list[bytes]:
        """Return [bytes of the image]. Raise LongerThanAllowed or another OSError if it cannot be read."""
        if self.is_gzip:
            data = readers.gzip.read(self.uri, self.offset, self.num_bytes, f"the image at byte {self.offset:,}")
        else:
            data = store.read_bytes(self.uri, self.offset, self.offset + self.num_bytes)
        return [decode_inline(self._parse(data), max_bytes)]

    def _parse(self, data: bytes) -> str:
        try:
            text = json.loads(data, strict=False)
        except ValueError:
            text = None
        if not isinstance(text, str) or len(data) != self.num_bytes:
            raise OSError(f"{store.redact(self.uri)} has changed since it was listed")
        return text

    def to_struct(self) -> Struct:
        """Convert the reference to an item of the manifest's column `images`."""
        return self._make_struct("json.gz" if self.is_gzip else "json", offset=self.offset, num_bytes=self.num_bytes)


ImageRef = FileRef | TarRef | CellRef | InlineRef


def parse_reference(struct: Mapping[str, Any]) -> ImageRef:
    """Build the reference that `to_struct` has stored in `struct`. Raise ValueError for an unsupported kind."""
    uri, offset, num_bytes, member = (struct[name] for name in ("uri", "offset", "num_bytes", "member"))
    window = Window(struct["start_s"], struct["stop_s"])
    match struct["kind"]:
        case "file":
            return FileRef(uri, num_bytes, window=window)
        case "tar" | "tgz" as kind:
            return TarRef(uri, offset, num_bytes, member, kind == "tgz", window=window)
        case "json" | "json.gz" as kind:
            return InlineRef(uri, offset, num_bytes, kind == "json.gz", window=window)
        case "parquet":
            return CellRef(uri, member, struct["row"], window=window)
        case "arrow":
            return CellRef(uri, member, struct["row"], ByteRange(offset, num_bytes), window=window)
        case kind:
            raise ValueError(f"references of kind {kind!r} are not supported; was OUTPUT started by a newer version?")


def get_listed_bytes(image: ImageRef) -> int:
    """Return the number of bytes that was listed for the image, -1 if unknown."""
    return -1 if isinstance(image, CellRef) else image.num_bytes


def is_sequential(image: ImageRef) -> bool:
    """Return whether reading the image also reads what precedes it, so that one thread must read all of them."""
    return isinstance(image, CellRef) or (isinstance(image, TarRef | InlineRef) and image.is_gzip)


def is_video(image: ImageRef) -> bool:
    """Return whether the name is that of a video. Media without a name are recognized by content when read."""
    if isinstance(image, CellRef | InlineRef):
        return False
    return PurePosixPath(_get_name(image)).suffix.lower() in VIDEO_SUFFIXES


def may_be_video(image: ImageRef) -> bool:
    """Return whether the image has the name of a video or none that tells, so that its content decides."""
    if isinstance(image, CellRef | InlineRef):
        return True
    kind, _ = mimetypes.guess_type(_get_name(image))
    return is_video(image) or kind is None or not kind.startswith("image/")


def _get_name(image: FileRef | TarRef) -> str:
    return image.member if isinstance(image, TarRef) else store.strip_query(image.uri)


def locate(image: ImageRef) -> tuple[str, int]:
    """Return (URI, offset in bytes) of the image; the offset is -1 for a whole file."""
    if isinstance(image, CellRef):
        return image.uri, image.batch.offset if image.batch else -1
    return image.uri, image.offset if isinstance(image, TarRef | InlineRef) else -1


def can_read_image(image: ImageRef) -> bool:
    """Return whether the store delivers one byte of the image now."""
    return store.probe_byte(image.uri, 0 if is_sequential(image) else max(0, locate(image)[1]))


def is_seekable_video(images: Sequence[ImageRef]) -> bool:
    """Return whether the row is one video that can be decoded in place: a file, or a byte range of one."""
    return len(images) == 1 and is_video(images[0]) and not is_sequential(images[0])


def locate_video(images: Sequence[ImageRef], encoded: Sequence[bytes]) -> tuple[VideoLocation, Window]:
    """Return the location of the row's video (its bytes if `encoded`) and the window to sample.

    Raise MediaError if the row holds more than the video.
    """
    if len(images) > 1 or len(encoded) > 1:
        raise MediaError("a row with a video must hold nothing else; split it into one row per video or image")
    if encoded:
        return VideoLocation(images[0].uri, data=encoded[0]), images[0].window
    return VideoLocation(*locate(images[0]), get_listed_bytes(images[0])), images[0].window


def resolve_path(path: str, base_uri: str) -> str:
    """Resolve a `path` in the file `base_uri`: keep a URI or absolute path, else join it to the file's folder.

    In a store, `.` and `..` are resolved, as it knows neither. A path above the bucket is kept; it cannot be opened.
    """
    if path.startswith("/"):
        return path
    uri = path if "://" in path else f"{store.strip_query(base_uri).rpartition('/')[0]}/{path}"
    return store.resolve_dots(uri) or uri
