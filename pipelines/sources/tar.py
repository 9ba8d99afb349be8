"""WebDataset shards: an index of a tar in which all members of one key are one row."""

from __future__ import annotations

import gzip
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipelines.errors import SourceError
from pipelines.media.reference import ImageRef, Kind
from pipelines.sources.files import IMAGE_SUFFIXES, log_left_out
from pipelines.sources.rows import Chunk, Columns, Row, chunks_of, json_object, row_error, text_of
from pipelines.storage import store
from pipelines.storage.store import FileInfo

MAX_MEMBERS = 10_000_000
MAX_SIDECAR_BYTES = 4 << 20
MAX_NAME, MAX_NAMES = 4096, 96 << 20  # characters of a name, and of all: they are held until the tar is read
MAX_UNPACKED_BYTES = 1 << 40  # of a tar.gz: what lies behind would take an hour to reach
_MOST_PACKED = 200  # times; gzip packs zeros 1,000 times
_MAX_HEADER_BYTES = 1 << 20  # of long names and extended headers, which are read whole
_BLOCK_BYTES = 1 << 20  # members shorter than this cost no request of their own, longer ones are passed over

_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # as WebDataset: up to the first dot of the base name
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)


def list_tar(info: FileInfo, kind: Kind, columns: Columns) -> Iterator[Chunk]:
    """Rows in the order in which their keys first appear; last, if the tar is damaged, an error row that says where.

    No image is read; sidecars (.json, .txt) only if a column is wanted.
    """
    index = _Index(info, kind, columns.wanted)
    damage = index.read()
    log_left_out(info.uri, index.others)
    return chunks_of(_rows(index, columns, damage), columns.keep, frozenset(index.names))


def _rows(index: _Index, columns: Columns, damage: str | None) -> Iterator[Row]:
    for place, sample in index.samples.items():
        key, number = (place, 1) if isinstance(place, str) else place
        yield sample.row(key, number, index, columns)
    if damage is not None:
        yield Row(f"{index.uri}#byte-{index.end}", index.uri, error=damage)


class _Member(NamedTuple):
    """An image: what follows the key in its name, and its place."""

    extension: str
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Sample:
    """Members of one key, of each extension one. As small as may be: there are millions."""

    extensions: tuple[str, ...] = ()
    images: tuple[_Member, ...] = ()
    values: dict[str, Any] | None = None
    error: str = ""

    def row(self, key: str, number: int, index: _Index, columns: Columns) -> Row:
        values = self.values or {}
        prompt = text_of(values.get(columns.prompt or ""))
        id_ = text_of(values.get(columns.id or "")) or f"{index.uri}#{key}{f'~{number}' if number > 1 else ''}"
        images = tuple(ImageRef(index.kind, index.uri, at, size, f"{key}.{end}") for end, at, size in self.images)
        return Row(id_, index.uri, images, prompt, values, self.error or row_error(images, prompt, f"key {key}"))


class _Index:
    """Reads the headers of a tar and the `wanted` columns of its sidecars; `end` is how far it came, in bytes."""

    def __init__(self, info: FileInfo, kind: Kind, wanted: frozenset[str]) -> None:
        self.uri, self.kind, self._wanted = info.uri, kind, wanted
        self._most_bytes = _most_unpacked(info.num_bytes) if kind == "tgz" else None
        self.names: set[str] = set()  # of columns
        self._name_characters = 0
        self.samples: dict[str | tuple[str, int], _Sample] = {}  # by key; with a number from the second of a key on
        self._repeats: dict[tuple[str, str], int] = {}
        self._extensions: dict[tuple[str, ...], tuple[str, ...]] = {}  # one of each
        self.others: Counter[str] = Counter()
        self.end = 0

    def read(self) -> str | None:
        """What is wrong with the tar, None if it is whole. Raises SourceError if it cannot be opened or read."""
        try:
            with _open(self.uri, self.kind) as file:
                self._read_members(file)
        except _DAMAGE as error:
            return f"the tar is damaged at byte {self.end:,} of its unpacked form, nothing behind is read: {error}"
        except OSError as error:
            raise SourceError(f"cannot read {store.shown(self.uri)}: {error}") from error
        return None

    def _read_members(self, file: Any) -> None:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_StrictHeader) as tar:
            for number in range(MAX_MEMBERS + 1):
                member = tar.next()
                if member is None:
                    break
                self._check(member, number)
                self._add(tar, member)
                self.end = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            _check_tail(file)

    def _check(self, member: tarfile.TarInfo, number: int) -> None:
        if number == MAX_MEMBERS:
            raise tarfile.ReadError(f"more than {MAX_MEMBERS:,} members; use smaller shards")
        self._name_characters += len(member.name)
        if len(member.name) > MAX_NAME or self._name_characters > MAX_NAMES:
            raise tarfile.ReadError(f"a name longer than {MAX_NAME:,}, or all longer than {MAX_NAMES:,} characters")
        if member.size < 0 or member.offset_data < self.end:
            raise tarfile.ReadError("a header with a negative size")
        if self._most_bytes is not None and member.offset_data + member.size > self._most_bytes:
            raise tarfile.ReadError(f"more than {self._most_bytes:,} bytes unpacked; use plain tar or smaller shards")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        match = _KEY.fullmatch(name)
        suffix = PurePosixPath(name).suffix.lower()
        if match is None or suffix not in IMAGE_SUFFIXES | {".json", ".txt"}:
            self.others[suffix or "no suffix"] += 1
            return
        sample = self._sample(match[1], sys.intern(match[2].lower()))
        if suffix in IMAGE_SUFFIXES:
            self._add_image(sample, member, name, sys.intern(match[2]))
        elif self._wanted:
            self._add_sidecar(sample, tar, member, name)

    def _sample(self, key: str, extension: str) -> _Sample:
        """The first sample of the key that has no such member yet, or a further one."""
        sample = self.samples.setdefault(key, _Sample())
        if extension in sample.extensions:
            number = self._repeats[key, extension] = self._repeats.get((key, extension), 1) + 1
            sample = self.samples.setdefault((key, number), _Sample())
        extensions = (*sample.extensions, extension)
        sample.extensions = self._extensions.setdefault(extensions, extensions)
        return sample

    def _add_image(self, sample: _Sample, member: tarfile.TarInfo, name: str, extension: str) -> None:
        if not member.isreg() or member.issparse():
            sample.error = f"{name} is a {'sparse file' if member.isreg() else 'link or device'}; only files are read"
            return
        sample.images += (_Member(extension, member.offset_data, member.size),)

    def _add_sidecar(self, sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        if not member.isreg() or member.issparse() or member.size > MAX_SIDECAR_BYTES:
            sample.error = f"{name} is no file of at most {MAX_SIDECAR_BYTES:,} bytes"
            return
        file = tar.extractfile(member)
        assert file is not None, name
        try:
            values = _values(name, file.read())
        except ValueError as error:
            sample.error = f"{name} cannot be read: {error}"
        else:
            self.names |= values.keys()
            wanted = {key: value for key, value in values.items() if key in self._wanted}
            sample.values = {**(sample.values or {}), **wanted}


def _most_unpacked(num_bytes: int) -> int:
    """Of a tar.gz of so many bytes: pictures pack badly, so much more is none of them but a trap."""
    if num_bytes < 0:
        return MAX_UNPACKED_BYTES
    return min(MAX_UNPACKED_BYTES, max(1 << 30, _MOST_PACKED * num_bytes))


def _check_tail(file: Any) -> None:
    """A damaged block looks like an end mark, and one tar behind another would be passed over."""
    if file.read(_BLOCK_BYTES).strip(b"\0"):
        raise tarfile.ReadError("an end mark with more data behind it")


def _values(name: str, data: bytes) -> dict[str, Any]:
    """Of a sidecar. Raises ValueError."""
    return {"txt": data.decode("utf-8-sig").strip()} if name.lower().endswith(".txt") else json_object(data)


@contextmanager
def _open(uri: str, kind: Kind) -> Iterator[Any]:
    with store.open_file(uri, block_bytes=_BLOCK_BYTES) as file:
        if kind == "tar":
            yield file
        else:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked


class _StrictHeader(tarfile.TarInfo):
    """TarFile takes a header that it cannot read for the end of the archive: here it is damage."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictHeader:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without an end mark: truncated") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > _MAX_HEADER_BYTES):
            raise tarfile.HeaderError(f"a header of {header.size:,} bytes")
        return header
