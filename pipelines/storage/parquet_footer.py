"""Look for encryption in the footer of a Parquet file: Arrow aborts the process where it meets an encrypted column."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

_MAGIC_ENCRYPTED = b"PARE"
_MAX_FOOTER_BYTES = 4 << 20  # the first row group is near the start of the footer
_TAIL_BYTES = 8  # length of the footer, then the magic
_ROW_GROUPS, _COLUMNS, _CRYPTO_METADATA = 4, 1, 8  # fields of FileMetaData, RowGroup and ColumnChunk
_TRUE, _FALSE, _BYTE, _I16, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12


def find_encryption(file: Any) -> str | None:
    """Return what of a Parquet file is encrypted, None if nothing seems to be."""
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(max(0, num_bytes - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if tail.endswith(_MAGIC_ENCRYPTED):
        return "it is encrypted"
    length = int.from_bytes(tail[:4], "little")
    file.seek(max(0, num_bytes - _TAIL_BYTES - length))
    has_encrypted = _has_encrypted_column(file.read(min(length, _MAX_FOOTER_BYTES)))
    file.seek(0)
    return "it has encrypted columns" if has_encrypted else None


def _has_encrypted_column(footer: bytes) -> bool:
    """Return whether a column of the first row group states how it is encrypted. Arrow reports damaged footers."""
    try:
        return _Thrift(footer).has_encrypted_column()
    except (IndexError, ValueError, RecursionError):
        return False


class _Thrift:
    """A reader of Thrift's compact protocol that skips all but the fields it looks for."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def has_encrypted_column(self) -> bool:
        """Return whether FileMetaData.row_groups[0].columns[any].crypto_metadata is there."""
        for _ in self._find_list(_ROW_GROUPS):
            return any(self._has_field(_CRYPTO_METADATA) for _ in self._find_list(_COLUMNS))
        return False

    def _find_list(self, wanted: int) -> Iterator[int]:
        """Skip to the list of structs in field `wanted`; yield at each item, which the caller must read."""
        for number, kind in self._read_fields():
            if number == wanted and kind == _LIST:
                size, _ = self._read_list_header()
                yield from range(size)
                return
            self._skip(kind)

    def _has_field(self, wanted: int) -> bool:
        """Read a struct; return whether it has the field `wanted`."""
        found = False
        for number, kind in self._read_fields():
            found |= number == wanted
            self._skip(kind)
        return found

    def _read_fields(self) -> Iterator[tuple[int, int]]:
        """Yield (number, kind) per field of a struct; the caller must skip its value."""
        number = 0
        while (header := self._read_byte()) & 15:
            delta, kind = header >> 4, header & 15
            zigzag = 0 if delta else self._read_varint()
            number = number + delta if delta else (zigzag >> 1) ^ -(zigzag & 1)
            yield number, kind

    def _skip(self, kind: int) -> None:
        match kind:
            case k if k in (_TRUE, _FALSE):
                pass
            case k if _I16 <= k <= _I64:
                self._read_varint()
            case k if k == _STRUCT:
                self._has_field(0)
            case k if k in (_LIST, _SET):
                self._skip_items(*self._read_list_header())
            case k if k == _MAP:
                self._skip_map()
            case k if k in (_BYTE, _DOUBLE, _BINARY):
                num_bytes = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._read_varint()
                self._at += num_bytes
            case _:
                raise ValueError(f"no such kind: {kind}")

    def _skip_items(self, size: int, kind: int) -> None:
        for _ in range(size):
            self._skip(_BYTE if kind in (_TRUE, _FALSE) else kind)

    def _skip_map(self) -> None:
        if size := self._read_varint():
            kinds = self._read_byte()
            for _ in range(size):
                self._skip(kinds >> 4)
                self._skip(kinds & 15)

    def _read_list_header(self) -> tuple[int, int]:
        header = self._read_byte()
        return (self._read_varint() if header >> 4 == 15 else header >> 4), header & 15

    def _read_byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _read_varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
