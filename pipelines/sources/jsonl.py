"""List JSON lines and arrays of objects: each object names or holds its images, a prompt and columns."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from ovis_model.wording import count_nouns
from pipelines.errors import SourceError
from pipelines.media.reference import InlineRef
from pipelines.sources.conversations import (
    OTHER_COUNT,
    UNUSED_TURNS,
    Conversation,
    find_conversation,
    is_turns,
    unwrap_request,
)
from pipelines.sources.json_elements import Element, Read, split_file
from pipelines.sources.json_images import ImageFinder, get_images, hide_inline, make_reference
from pipelines.sources.plain_json import make_plain_chunk
from pipelines.sources.rows import (
    ROWS_PER_CHUNK,
    Chunk,
    ColumnRoles,
    SourceRow,
    group_into_chunks,
    parse_json_object,
    raise_source_errors,
)
from pipelines.storage import store
from pipelines.storage.store import FileInfo

_BLOCK_BYTES = 8 << 20
_MAX_KEPT_BYTES = 4096  # of a row's values that need not be examined


def list_jsonl(info: FileInfo, columns: ColumnRoles, *, max_line_bytes: int = 16 << 20) -> Iterator[Chunk]:
    """List one row per line that is not blank, or per element of an array; an invalid one becomes an error row."""
    parser = _RowParser(info.uri, columns)
    with raise_source_errors(info.uri):
        elements = _read_elements(info.uri, max_line_bytes)
        while some := list(islice(elements, ROWS_PER_CHUNK)):
            yield from parser.make_chunks(some)


def _read_elements(uri: str, max_line_bytes: int) -> Iterator[Element]:
    number, unit = 0, "line"
    try:
        with store.open_file(uri, block_bytes=_BLOCK_BYTES) as file:
            for element in split_file(uri, _get_read(uri, file), max_line_bytes):
                number, unit = element.number, element.unit
                yield element
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        text = f"the file is damaged after {unit} {number}; the rest is not read: {error}"
        yield Element(number + 1, "", 0, b"", text)


def _get_read(uri: str, file: Any) -> Read:
    # read1 returns what was unpacked before the damage instead of losing it.
    read: Read = gzip.GzipFile(fileobj=file).read1 if store.strip_query(uri).lower().endswith(".gz") else file.read
    return read


class _RowParser:
    """Turns the elements of one file into rows."""

    def __init__(self, uri: str, columns: ColumnRoles) -> None:
        self._uri, self._has_given_prompt = uri, columns.prompt is not None
        self._prompt = columns.prompt or "prompt"
        self._columns = replace(columns, id=columns.id or "id", prompt=self._prompt)
        self._wanted = self._columns.wanted
        self._finder = ImageFinder(uri)

    def make_chunks(self, elements: Sequence[Element]) -> Iterator[Chunk]:
        """Yield the rows of some elements."""
        if plain := make_plain_chunk(self._uri, elements, self._columns):
            yield plain
        else:
            yield from group_into_chunks(map(self.parse, elements), self._columns.keep)

    def parse(self, element: Element) -> SourceRow:
        """Return the row of an element, an error row if it is invalid. Raise SourceError if its images are unclear."""
        try:
            if element.error:
                raise ValueError(element.error)
            return self._parse_object(element, unwrap_request(parse_json_object(element.data)))
        except SourceError:
            raise
        except ValueError as error:
            text = f"{element.unit} {element.number}: {error}" if element.unit else str(error)
            return SourceRow(f"{self._uri}#{element.number}", self._uri, error=text)

    def _parse_object(self, element: Element, values: dict[str, Any]) -> SourceRow:
        conversation = find_conversation(values, self._prompt)
        images = tuple([make_reference(self._uri, image, element) for image in self._get_images(values, conversation)])
        if not images and self._columns.image != "":
            self._check_text_only(values, conversation)
        if conversation is not None:
            values = {**values, self._prompt: self._choose_prompt(values, conversation)}
        data = element.data
        # A chunk of rows has no memory for images as text, in whatever field.
        if len(data) > _MAX_KEPT_BYTES or b"data:" in data or InlineRef in map(type, images):
            values = {name: hide_inline(value) if name in self._wanted else None for name, value in values.items()}
        row = self._columns.make_row(self._uri, element.number, values, images, unit=element.unit)
        return row if conversation is None else replace(row, notes=_describe(conversation, len(images)))

    def _get_images(self, values: dict[str, Any], conversation: Conversation | None) -> list[Any]:
        column = self._columns.image
        if conversation is not None and conversation.media and (column is None or is_turns(values.get(column))):
            return list(conversation.media)
        return get_images(self._uri, values, column)

    def _check_text_only(self, values: dict[str, Any], conversation: Conversation | None) -> None:
        """Raise SourceError or ValueError if a row without images names some in another way."""
        if conversation is not None and conversation.has_later_media:
            raise ValueError("only a later turn of the conversation has an image; only the user's first turn is used")
        if self._columns.image is None:
            self._finder.check_text_only(values)
        if conversation is not None and conversation.num_marks:
            raise ValueError(f"the text marks {count_nouns(conversation.num_marks, 'image')}, but the row has none")

    def _choose_prompt(self, values: dict[str, Any], conversation: Conversation) -> Any:
        """Return the row's own prompt: a given column that is empty means the run's prompt."""
        own = values.get(self._prompt)
        if is_turns(own) or (not own and not self._has_given_prompt):
            return conversation.text
        return own


def _describe(conversation: Conversation, num_images: int) -> tuple[str, ...]:
    """Return what to count in the log about a row."""
    unused = (UNUSED_TURNS,) if conversation.has_other_turns else ()
    return (*unused, OTHER_COUNT) if conversation.num_marks not in (0, num_images) else unused
