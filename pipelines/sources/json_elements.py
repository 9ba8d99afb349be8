"""Split JSON files into elements: the lines of JSON lines, or the elements of one array; knows nothing of rows.

Memory holds a few times the maximum length of an element. json's C scanner finds the ends of elements: it takes
3.8 microseconds per element of LLaVA's files, and ijson with yajl2_c 4.5, which reports no offsets.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain, count
from typing import NamedTuple

from pipelines.errors import SourceError
from pipelines.storage import store

Read = Callable[[int], bytes]
_READ_BYTES = 1 << 20
_BLANK = b" \t\r\n\xef\xbb\xbf"
_SEPARATORS = re.compile(r"[\s,\ufeff]*")
_TOKEN = re.compile(r'\\.|[][{}",]', re.DOTALL)
_decode = json.JSONDecoder().raw_decode


class Element(NamedTuple):
    """One JSON value of a file: what it is called in messages, and its text from byte `offset` of the unpacked file."""

    number: int
    unit: str
    offset: int
    data: bytes
    error: str = ""


def split_file(uri: str, read: Read, max_bytes: int) -> Iterator[Element]:
    """Yield the elements of a file. A `.json` may hold an array or JSON lines; other files hold JSON lines."""
    if not store.strip_query(uri).lower().removesuffix(".gz").endswith(".json"):
        return split_lines(read, max_bytes)
    blocks = _read_blocks(read)
    start = b""
    while not start.lstrip(_BLANK) and (block := next(blocks, b"")):
        start += block
    read_again = _join_blocks(chain([start], blocks))
    if start.lstrip(_BLANK).startswith(b"["):
        return split_array(read_again, max_bytes)
    _check_first_line(uri, start)
    return split_lines(read_again, max_bytes)


def _read_blocks(read: Read) -> Iterator[bytes]:
    while block := read(_READ_BYTES):
        yield block


def _join_blocks(blocks: Iterator[bytes]) -> Read:
    return lambda _: next(blocks, b"")


def _check_first_line(uri: str, start: bytes) -> None:
    """Raise SourceError for a file that holds one object over several lines."""
    line, newline, _ = start.lstrip(_BLANK).partition(b"\n")
    try:
        json.loads(line) if newline else None
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{store.redact(uri)} holds neither an array of objects nor one object per line; convert it to JSON lines"
        ) from error


def split_lines(read: Read, max_bytes: int) -> Iterator[Element]:
    """Yield the lines that are not blank, numbered from 1; the data of a line that is too long is dropped."""
    number = offset = num_bytes = 0
    unfinished = bytearray()  # of a line of `num_bytes` so far: at most one block more than `max_bytes`
    for block in _read_blocks(read):
        first, *others = block.split(b"\n")
        num_bytes += len(first)
        if len(unfinished) <= max_bytes:
            unfinished += first
        for line in others:
            number += 1
            yield from _make_line(number, offset, bytes(unfinished), max_bytes)
            offset += num_bytes + 1
            unfinished, num_bytes = bytearray(line), len(line)
    yield from _make_line(number + 1, offset, bytes(unfinished), max_bytes)


def _make_line(number: int, offset: int, line: bytes, max_bytes: int) -> tuple[Element, ...]:
    if not line.strip():
        return ()
    if len(line) > max_bytes:
        return (Element(number, "line", offset, b"", f"longer than {max_bytes:,} bytes"),)
    return (Element(number, "line", offset, line),)


def split_array(read: Read, max_bytes: int) -> Iterator[Element]:
    """Yield the elements of an array, numbered from 0; an element that is not JSON is skipped and has an error."""
    window = _Window(read)
    window.skip_separators()
    window.advance(window.at + 1)  # [
    for number in count():
        mark = window.skip_separators()
        offset = window.offset
        if mark != "" and mark != "]":
            data, error = window.take_value(max_bytes)
            yield Element(number, "element", offset, data, error)
            if error and window.is_exhausted:
                return
            continue
        window.advance(window.at + len(mark))
        if mark == "":
            yield Element(number, "element", offset, b"", "the file ends within the array; it is truncated")
        elif window.skip_separators():
            yield Element(number, "element", window.offset, b"", "what follows the end of the array is not read")
        return


class _Window:
    """The part of a file from the position `at` of `text`, which is byte `offset` of the file."""

    def __init__(self, read: Read) -> None:
        self._read = read
        # Bytes that are not UTF-8 come back when the element is encoded, so only its row fails.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._is_at_end = False
        self.text, self.at, self.offset = "", 0, 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the whole file has been passed."""
        return self._is_at_end and self.at == len(self.text)

    def extend(self) -> bool:
        """Drop what has been passed and read on; return False at the end of the file."""
        added, min_length = "", 2 * (len(self.text) - self.at)  # doubles, as the text is scanned again
        while not self._is_at_end and len(added) <= min_length:
            block = self._read(_READ_BYTES)
            self._is_at_end = not block
            added += self._decoder.decode(block, final=not block)
        if added:
            self.text, self.at = self.text[self.at :] + added, 0
        return bool(added)

    def advance(self, end: int) -> bytes:
        """Pass the text up to `end` and return it as bytes."""
        data = self.text[self.at : end].encode("utf-8", "surrogateescape")
        self.at, self.offset = end, self.offset + len(data)
        return data

    def skip_separators(self) -> str:
        """Pass blanks and commas; return the next character, "" at the end of the file."""
        while True:
            self.advance(_SEPARATORS.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.extend():
                return self.text[self.at : self.at + 1]

    def take_value(self, max_bytes: int) -> tuple[bytes, str]:
        """Pass one value; return (its text, "") or (b"", why it cannot be read)."""
        while True:
            try:
                end = _decode(self.text, self.at)[1]
                if self._is_cut_number(end) and self.extend():
                    continue
                data = self.advance(end)
                return (data, "") if len(data) <= max_bytes else (b"", f"longer than {max_bytes:,} bytes")
            except RecursionError:
                return b"", self._skip_value("nested too deeply")
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > max_bytes:
                    return b"", self._skip_value(f"longer than {max_bytes:,} bytes")
                if not self._may_continue(error) or not self.extend():
                    return b"", self._skip_value(f"not JSON: {error.msg}")

    def _is_cut_number(self, end: int) -> bool:
        """Return whether the value that ends at `end` may be a number that continues after the text."""
        return end > len(self.text) - 3 and self.text[self.at] not in '{["'

    def _may_continue(self, error: json.JSONDecodeError) -> bool:
        """Return whether the value may be valid but continue after the text; an escape has up to 12 characters."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16

    def _skip_value(self, reason: str) -> str:
        """Pass a value that is not JSON up to the end of its brackets; return the reason, completed."""
        depth, is_string = 0, False
        while True:
            last = self.at
            for match in _TOKEN.finditer(self.text, self.at):
                token, last = match[0], match.end()
                if token == '"':
                    is_string = not is_string
                elif not is_string and depth == 0 and token in (",", "]"):
                    self.advance(match.start())
                    return reason
                elif not is_string:
                    depth += (token in ("{", "[")) - (token in ("}", "]"))
                    if depth <= 0 and token in ("}", "]"):
                        self.advance(last)
                        return reason
            end = len(self.text)
            self.advance(end - (end > last and self.text[-1] == "\\"))  # an escape may continue in the next block
            if not self.extend():
                self.advance(len(self.text))
                return f"{reason}; its end is not found and the rest is not read"
