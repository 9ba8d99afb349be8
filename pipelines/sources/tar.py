"""List WebDataset shards: index a tar, where all members of one key form one row."""

from __future__ import annotations

import gzip
import logging
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ovis_model.wording import count_nouns
from pipelines.config import GroupBy
from pipelines.media.inline import shorten_inline
from pipelines.media.reference import TarRef
from pipelines.sources.companions import Companion
from pipelines.sources.directories import log_skipped
from pipelines.sources.json_images import find_image_field
from pipelines.sources.kinds import IMAGE_SUFFIXES
from pipelines.sources.rows import (
    Chunk,
    ColumnRoles,
    SourceRow,
    escape_name,
    group_into_chunks,
    parse_json_object,
    raise_source_errors,
)
from pipelines.sources.selection import is_hidden_path
from pipelines.storage import store
from pipelines.storage.store import FileInfo

_MAX_HEADER_BYTES = 1 << 20  # long names and extended headers are read whole
_BLOCK_BYTES = 1 << 20  # shorter members cost no extra request, longer ones are skipped

_KEYS: dict[GroupBy, re.Pattern[str]] = {
    "basename": re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL),  # as WebDataset: up to the first dot
    "file": re.compile(r"((?:.*/)?[^/.][^/]*)\.([^/.]+)", re.DOTALL),  # up to the last dot
}
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarLimits:
    """Limits on the content of a tar."""

    max_members: int = 10_000_000
    max_sidecar_bytes: int = 4 << 20
    max_name_characters: int = 4096
    max_names_characters: int = 96 << 20  # all names together; they stay in memory until the tar is read
    max_unpacked_bytes: int = 1 << 40  # of a tar.gz; unpacking up to there takes an hour
    max_gzip_ratio: int = 200  # unpacked bytes per byte of a tar.gz; gzip packs zeros 1,000 times
    always_allowed_bytes: int = 1 << 30  # allowed for any size of the tar.gz

    def compute_max_bytes(self, packed_bytes: int) -> int:
        """Return the maximum unpacked size: images barely compress, so a higher ratio indicates a gzip bomb."""
        if packed_bytes < 0:
            return self.max_unpacked_bytes
        return min(self.max_unpacked_bytes, max(self.always_allowed_bytes, self.max_gzip_ratio * packed_bytes))


def list_tar(
    info: FileInfo,
    columns: ColumnRoles,
    *,
    is_gzip: bool,
    group_by: GroupBy = "basename",
    limits: TarLimits | None = None,
) -> Iterator[Chunk]:
    """List rows in the order in which their keys first appear; if the tar is damaged, the last row is an error row.

    Images are not read, and sidecars (.json, .txt) only if a column is wanted. `is_gzip` is what the name indicates;
    the content decides.
    """
    index = _Index(info, is_gzip, columns.wanted, group_by, limits or TarLimits())
    damage = index.read()
    log_skipped(info.uri, index.others)
    if companion := Companion.find(info.uri, columns.wanted):
        index.join(companion)
    return group_into_chunks(_make_rows(index, columns, damage), columns.keep, frozenset(index.names))


def _make_rows(index: _Index, columns: ColumnRoles, damage: str | None) -> Iterator[SourceRow]:
    for sample_key, sample in index.samples.items():
        key, number = (sample_key, 1) if isinstance(sample_key, str) else sample_key
        if number > 1 and index.group_by == "file":  # images of one stem share its sidecars
            sample = replace(sample, values=sample.values or index.samples[key].values)
        yield sample.make_row(key, number, index, columns)
    if damage is not None:
        yield SourceRow(f"{index.uri}#byte-{index.end}", index.uri, error=damage)


class _Member(NamedTuple):
    """An image: the part of its name after the key, and its byte range."""

    extension: str
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Sample:
    """Members of one key, one per extension, as WebDataset calls them. Kept small: a tar may have millions."""

    extensions: tuple[str, ...] = ()
    images: tuple[_Member, ...] = ()
    values: dict[str, Any] | None = None
    image_field: str = ""  # of a sidecar, seems to name an image
    error: str = ""

    def make_row(self, key: str, number: int, index: _Index, columns: ColumnRoles) -> SourceRow:
        images = tuple(TarRef(index.uri, at, size, f"{key}.{end}", index.is_gzip) for end, at, size in self.images)
        unique_key = f"{key}~{number}" if number > 1 else key
        row = columns.make_row(index.uri, unique_key, self.values or {}, images, unit="key")
        error = self.error or (not images and columns.image is None and self._describe_lost_image(key))
        return replace(row, error=error) if error else row

    def _describe_lost_image(self, key: str) -> str:
        """Return why a key without an image may not be sent as text only; "" if it may."""
        if not self.image_field:
            return ""
        field = shorten_inline(self.image_field)
        return (
            f"key {key}: no image, but the field {field!r} of its sidecar seems to name one; add the image to the tar, "
            "or send such rows as text only with --image-column ''"
        )


class _Index:
    """Index of the headers of a tar and the `wanted` columns of its sidecars; `end` is the bytes read so far."""

    def __init__(
        self, info: FileInfo, is_gzip: bool, wanted: frozenset[str], group_by: GroupBy, limits: TarLimits
    ) -> None:
        self.uri, self.is_gzip, self.wanted, self.group_by = info.uri, is_gzip, wanted, group_by
        self._num_bytes, self._limits, self._max_bytes = info.num_bytes, limits, sys.maxsize
        self.names: set[str] = set()  # names of columns
        self._name_characters = 0
        # By key, or (key, number) from the second sample of a key on.
        self.samples: dict[str | tuple[str, int], _Sample] = {}
        self._repeats: dict[tuple[str, str], int] = {}
        self._extensions: dict[tuple[str, ...], tuple[str, ...]] = {}  # shared tuples, to save memory
        self.others: Counter[str] = Counter()
        self.end = 0

    def read(self) -> str | None:
        """Index the tar; return what is damaged, None if it is whole. Raise SourceError if it cannot be read."""
        with raise_source_errors(self.uri):
            try:
                with store.open_file(self.uri, block_bytes=_BLOCK_BYTES) as file:
                    self._detect_gzip(file)
                    self._read_members(gzip.GzipFile(fileobj=file) if self.is_gzip else file)
            except _DAMAGE as error:
                return f"the tar is damaged at byte {self.end:,} of its unpacked form; the rest is not read: {error}"
        return None

    def join(self, companion: Companion) -> None:
        """Add the columns of a table next to the tar; a sidecar in the tar has precedence. Log the missing keys."""
        self.names |= companion.names
        without_row = {key for key in self.samples if isinstance(key, str)}
        for key, values in companion.read_rows() if companion.wanted else ():
            if sample := self.samples.get(key):
                sample.values = {**values, **(sample.values or {})}
                without_row.discard(key)
        if companion.wanted and without_row:
            logger.warning(
                "%s has no row for %s of the tar; those columns are null",
                store.redact(companion.uri),
                count_nouns(len(without_row), "key"),
            )

    def _detect_gzip(self, file: Any) -> None:
        """Set `is_gzip` by content, and log a name that is wrong. Raise ReadError for another compression."""
        start = file.read(tarfile.BLOCKSIZE)
        file.seek(0)
        for magic, name in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise tarfile.ReadError(f"it is a {name} file; convert it to .tar or .tar.gz")
        is_gzip = start.startswith(_GZIP) or (self.is_gzip and start[257:262] != b"ustar")
        if is_gzip != self.is_gzip:
            names = ("a tar.gz", "a plain tar") if is_gzip else ("a plain tar", "a tar.gz")
            logger.warning("%s is %s, not %s as its name says; it is read as such", store.redact(self.uri), *names)
        self.is_gzip = is_gzip
        if is_gzip:
            self._max_bytes = self._limits.compute_max_bytes(self._num_bytes)

    def _read_members(self, file: Any) -> None:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_StrictHeader) as tar:
            for number in range(self._limits.max_members + 1):
                member = tar.next()
                if member is None:
                    break
                self._check(member, number)
                self._add(tar, member)
                self.end = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # TarFile would keep every member
            if file.read(_BLOCK_BYTES).strip(b"\0"):  # a damaged block or a second tar
                raise tarfile.ReadError("data after the end mark")

    def _check(self, member: tarfile.TarInfo, number: int) -> None:
        if number == self._limits.max_members:
            raise tarfile.ReadError(f"more than {number:,} members; use smaller shards")
        self._name_characters += len(member.name)
        max_one, max_all = self._limits.max_name_characters, self._limits.max_names_characters
        if len(member.name) > max_one or self._name_characters > max_all:
            raise tarfile.ReadError(
                f"a name is longer than {max_one:,} characters, or all names together than {max_all:,}"
            )
        if member.size < 0 or member.offset_data < self.end:
            raise tarfile.ReadError("a header has a negative size")
        if member.offset_data + member.size > self._max_bytes:
            raise tarfile.ReadError(f"more than {self._max_bytes:,} bytes unpacked; use plain tar or smaller shards")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        name = escape_name(member.name)
        match = None if is_hidden_path(name) else _KEYS[self.group_by].fullmatch(name)
        suffix = PurePosixPath(name).suffix.lower()
        if match is None or suffix not in IMAGE_SUFFIXES | {".json", ".txt"}:
            self.others[suffix or "no suffix"] += 1
            return
        is_single = self.group_by == "file" and suffix in IMAGE_SUFFIXES
        sample = self._get_sample(match[1], "image" if is_single else sys.intern(match[2].lower()))
        if suffix in IMAGE_SUFFIXES:
            self._add_image(sample, member, name, sys.intern(match[2]))
        elif self.wanted:
            self._add_sidecar(sample, tar, member, name)

    def _get_sample(self, key: str, extension: str) -> _Sample:
        """Return the first sample of the key without a member of this extension, else a new sample."""
        sample = self.samples.setdefault(key, _Sample())
        if extension in sample.extensions:
            number = self._repeats[key, extension] = self._repeats.get((key, extension), 1) + 1
            sample = self.samples.setdefault((key, number), _Sample())
        extensions = (*sample.extensions, extension)
        sample.extensions = self._extensions.setdefault(extensions, extensions)
        return sample

    def _add_image(self, sample: _Sample, member: tarfile.TarInfo, name: str, extension: str) -> None:
        if not member.isreg() or member.issparse():
            sample.error = (
                f"{name} is a {'sparse file' if member.isreg() else 'link or device'}; only regular files are read"
            )
            return
        sample.images += (_Member(extension, member.offset_data, member.size),)

    def _add_sidecar(self, sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        max_bytes = self._limits.max_sidecar_bytes
        if not member.isreg() or member.issparse() or member.size > max_bytes:
            sample.error = f"{name} is not a regular file of at most {max_bytes:,} bytes"
            return
        file = tar.extractfile(member)
        assert file is not None, name
        try:
            values = _parse_sidecar(name, file.read())
        except ValueError as error:
            sample.error = f"{name} cannot be read: {error}"
        else:
            self.names |= values.keys()
            sample.image_field = sample.image_field or sys.intern(find_image_field(values) or "")
            wanted = {key: value for key, value in values.items() if key in self.wanted}
            sample.values = {**(sample.values or {}), **wanted}


def _parse_sidecar(name: str, data: bytes) -> dict[str, Any]:
    """Return the columns of a sidecar. Raise ValueError if it is not JSON or UTF-8 text."""
    return {"txt": data.decode("utf-8-sig").strip()} if name.lower().endswith(".txt") else parse_json_object(data)


class _StrictHeader(tarfile.TarInfo):
    """A header that raises if it is invalid; a plain TarFile would read it as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictHeader:
        """Read the next header. Raise ReadError for an invalid one."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("truncated: it has no end mark") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        """Parse a header. Raise HeaderError if its size is negative or its extended header too long."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > _MAX_HEADER_BYTES):
            raise tarfile.HeaderError(f"a header states {header.size:,} bytes")
        return header
