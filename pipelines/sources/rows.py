"""Define the row as listed from a source: id, references to images, prompt and columns; no payload."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.errors import SourceError, TableError
from pipelines.media.reference import ImageRef
from pipelines.storage import store

ROWS_PER_CHUNK = 1 << 12
MAX_DEPTH = 40  # of JSON; Arrow stores columns nested up to 64 deep


@dataclass(frozen=True)
class SourceRow:
    """A row as listed. `prompt` is its own prompt or None; a row with an `error` becomes an error row.

    notes: what the log counts rows by, such as "turns that are not used".
    """

    id: str
    uri: str
    images: tuple[ImageRef, ...] = ()
    prompt: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ColumnRoles:
    """Names of the columns of the input by role; None or empty if not requested."""

    id: str | None = None
    image: str | None = None
    prompt: str | None = None
    subtitles: str | None = None
    keep: tuple[str, ...] = ()
    in_prompt: frozenset[str] = frozenset()
    may_be_columns: bool = True  # False if each row must come from `make_row`

    def make_row(
        self, source: str, number: object, values: Mapping[str, Any], images: tuple[ImageRef, ...], *, unit: str
    ) -> SourceRow:
        """Build the row at `number` of `source`, counted in `unit`s such as "line", from the values of its columns."""
        prompt = to_text(values.get(self.prompt or ""))
        id_ = to_text(values.get(self.id or "")) or f"{source}#{number}"
        # The run's prompt asks about an image, so a row without one needs a prompt of its own.
        error = "" if images or prompt else f"{unit} {number}: no image, and no prompt of its own"
        return SourceRow(id_, images[0].uri if images else source, images, prompt, values, error)

    @property
    def wanted(self) -> frozenset[str]:
        """All columns that the listing must read, without that of the images."""
        return self.text_columns.union(self.keep)

    @property
    def text_columns(self) -> frozenset[str]:
        """The columns whose values form ids and prompts."""
        return self.in_prompt.union(filter(None, (self.id, self.prompt, self.subtitles)))


@dataclass(frozen=True)
class Chunk:
    """Some rows of one source, the names of its columns, and a table of the kept columns, one row each.

    `columns` holds the rows instead of `rows` if all are plain: see `columns.make_columns`.
    `unreadable` chunks hold the error row of a shard of which no row could be listed.
    """

    rows: Sequence[SourceRow]
    names: frozenset[str] = frozenset()
    kept: pa.Table | None = None
    unreadable: bool = False
    columns: pa.Table | None = None

    def __len__(self) -> int:
        return len(self.rows if self.columns is None else self.columns)

    def take(self, count: int) -> Chunk:
        """Return the first `count` rows."""
        kept, columns = (None if table is None else table.slice(0, count) for table in (self.kept, self.columns))
        return replace(self, rows=self.rows[:count], kept=kept, columns=columns)


def group_into_chunks(
    rows: Iterable[SourceRow], keep: Sequence[str] = (), names: frozenset[str] | None = None
) -> Iterator[Chunk]:
    """Yield chunks of ROWS_PER_CHUNK rows; their columns are `names`, by default the keys of their `values`."""
    remaining = iter(rows)
    while some := list(islice(remaining, ROWS_PER_CHUNK)):
        found = names if names is not None else frozenset(name for row in some for name in row.values)
        yield Chunk(some, found, pa.table({name: _build_array(some, name) for name in keep}) if keep else None)


def _build_array(rows: Sequence[SourceRow], name: str) -> pa.Array:
    try:
        return pa.array([row.values.get(name) for row in rows])
    except (pa.ArrowException, OverflowError) as error:
        raise SourceError(
            f"column {name!r} holds values of several types between {rows[0].id} and {rows[-1].id} ({error}); "
            "convert them to one type or remove it from --keep-columns"
        ) from error


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse an object in untrusted JSON. Raise ValueError, also for invalid JSON or UTF-8."""
    text = data.decode().removeprefix("\ufeff")  # the codec utf-8-sig is slower
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_nested_deeper(values, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if "\\u" in text and "\\ud" in text.lower():
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair cannot be stored
    return values


def _is_nested_deeper(value: Any, levels: int) -> bool:
    if levels == 0:
        return True
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_is_nested_deeper(item, levels - 1) for item in below)


def to_text(value: Any) -> str | None:
    """Return a value as the text of an id or a prompt, None if it is null or ""."""
    if value is None or value == "":
        return None
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


@contextmanager
def raise_source_errors(uri: str, form: str = "") -> Iterator[None]:
    """Raise SourceError instead of the errors that reading `uri` in this form may raise."""
    try:
        yield
    except (OSError, EOFError, TableError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {store.redact(uri)}{form}: {str(error) or 'it is empty'}") from error


def escape_name(name: str) -> str:
    r"""Return the name of a file as valid text: bytes that are not UTF-8 are written as \xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
