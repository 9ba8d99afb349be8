"""WebDataset shards: an index of a tar in which all members of one key are one row."""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pipelines import store
from pipelines.sources.files import IMAGE_SUFFIXES, log_left_out
from pipelines.sources.rows import Chunk, Columns, ImageRef, Kind, Row, SourceError, chunks_of, row_error, text_of
from pipelines.store import FileInfo

MAX_MEMBERS = 10_000_000
MAX_SIDECAR_BYTES = 4 << 20
MAX_UNPACKED_BYTES = 1 << 40  # of a tar.gz: what lies behind would take an hour to reach
_MAX_HEADER_BYTES = 1 << 20  # of long names and extended headers, which are read whole
_BLOCK_BYTES = 1 << 20  # members shorter than this cost no request of their own, longer ones are passed over

_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # as WebDataset: up to the first dot of the base name
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)


def list_tar(info: FileInfo, kind: Kind, columns: Columns) -> Iterator[Chunk]:
    """Rows in the order in which their keys first appear; last, if the tar is damaged, an error row that says where.

    No image is read; sidecars (.json, .txt) only if a column is wanted.
    """
    index = _Index(info.uri, kind, columns.wanted)
    damage = index.read()
    log_left_out(info.uri, index.others)
    rows = [row for sample in index.samples if (row := sample.row(index, columns)) is not None]
    if damage is not None:
        rows.append(Row(f"{info.uri}#byte-{index.end}", info.uri, error=damage))
    return chunks_of(rows, columns.keep, frozenset(index.names))


@dataclass
class _Sample:
    """Members of one key. `id_key` differs from the key from the second sample of a key on."""

    id_key: str
    extensions: set[str] = field(default_factory=set)
    images: list[ImageRef] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    has_sidecar: bool = False
    error: str = ""

    def row(self, index: _Index, columns: Columns) -> Row | None:
        """None if nothing in it is ours, such as a sample of sound."""
        if not (self.images or self.has_sidecar or self.error):
            return None
        prompt = text_of(self.values.get(columns.prompt or ""))
        id_ = text_of(self.values.get(columns.id or "")) or f"{index.uri}#{self.id_key}"
        error = self.error or row_error(self.images, prompt, f"key {self.id_key}")
        return Row(id_, index.uri, tuple(self.images), prompt, self.values, error)


class _Index:
    """Reads the headers of a tar and the `wanted` columns of its sidecars; `end` is how far it came, in bytes."""

    def __init__(self, uri: str, kind: Kind, wanted: frozenset[str]) -> None:
        self.uri, self._kind, self._wanted = uri, kind, wanted
        self.names: set[str] = set()
        self.samples: list[_Sample] = []
        self._samples_of: dict[str, list[_Sample]] = {}
        self.others: Counter[str] = Counter()
        self.end = 0

    def read(self) -> str | None:
        """What is wrong with the tar, None if it is whole. Raises SourceError if it cannot be opened or read."""
        try:
            with _open(self.uri, self._kind) as file:
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
        if member.size < 0 or member.offset_data < self.end:
            raise tarfile.ReadError("a header with a negative size")
        if self._kind == "tgz" and member.offset_data + member.size > MAX_UNPACKED_BYTES:
            raise tarfile.ReadError(f"more than {MAX_UNPACKED_BYTES:,} bytes unpacked; use smaller shards")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        match = _KEY.fullmatch(name)
        suffix = PurePosixPath(name).suffix.lower()
        if match is None or suffix not in IMAGE_SUFFIXES | {".json", ".txt"}:
            self.others[suffix or "no suffix"] += 1
            return
        sample = self._sample(match[1], match[2].lower())
        if suffix in IMAGE_SUFFIXES:
            self._add_image(sample, member, name)
        else:
            sample.has_sidecar = True
            if self._wanted:
                self._add_sidecar(sample, tar, member, name)

    def _sample(self, key: str, extension: str) -> _Sample:
        """The first sample of the key that has no such member yet, or a further one."""
        samples = self._samples_of.setdefault(key, [])
        for sample in samples:
            if extension not in sample.extensions:
                break
        else:
            sample = _Sample(f"{key}~{len(samples) + 1}" if samples else key)
            samples.append(sample)
            self.samples.append(sample)
        sample.extensions.add(extension)
        return sample

    def _add_image(self, sample: _Sample, member: tarfile.TarInfo, name: str) -> None:
        if not member.isreg() or member.issparse():
            sample.error = f"{name} is a {'sparse file' if member.isreg() else 'link or device'}; only files are read"
            return
        sample.images.append(ImageRef(self._kind, self.uri, member.offset_data, member.size, name))

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
            sample.values.update((key, value) for key, value in values.items() if key in self._wanted)


def _check_tail(file: Any) -> None:
    """A damaged block looks like an end mark, and one tar behind another would be passed over."""
    if file.read(_BLOCK_BYTES).strip(b"\0"):
        raise tarfile.ReadError("an end mark with more data behind it")


def _values(name: str, data: bytes) -> dict[str, Any]:
    """Of a sidecar. Raises ValueError."""
    text = data.decode("utf-8-sig")
    if name.lower().endswith(".txt"):
        return {"txt": text.strip()}
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair cannot be stored
    return values


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
