"""The row of a source: id, references to images, prompt and columns; no payload."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.errors import SourceError
from pipelines.media.reference import ImageRef
from pipelines.storage import store

ROWS_PER_CHUNK = 1 << 12
MAX_DEPTH = 40  # of JSON; Arrow stores columns that are nested up to 64 deep


@dataclass(frozen=True)
class SourceRow:
    """One row to be. `prompt` is its own, None if it has none; `error` says why it cannot even be read."""

    id: str
    uri: str
    images: tuple[ImageRef, ...] = ()
    prompt: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class ColumnRoles:
    """Which columns of the input are what. None or empty: not asked for."""

    id: str | None = None
    image: str | None = None
    prompt: str | None = None
    keep: tuple[str, ...] = ()
    in_prompt: frozenset[str] = frozenset()

    def make_row(
        self, source: str, number: object, values: Mapping[str, Any], images: tuple[ImageRef, ...], *, what: str
    ) -> SourceRow:
        """Return the row `number` of `source`, called `what` in messages; its id and prompt are among `values`."""
        prompt = to_text(values.get(self.prompt or ""))
        id_ = to_text(values.get(self.id or "")) or f"{source}#{number}"
        # A row needs an image or a question of its own: asking the run's question about nothing helps nobody.
        error = "" if images or prompt else f"{what} {number}: no image, and no prompt of its own"
        return SourceRow(id_, images[0].uri if images else source, images, prompt, values, error)

    @property
    def wanted(self) -> frozenset[str]:
        """Return all columns that the listing must read, which excludes the images."""
        return self.text_columns.union(self.keep)

    @property
    def text_columns(self) -> frozenset[str]:
        """Return the columns whose values make up ids and prompts."""
        return self.in_prompt.union(filter(None, (self.id, self.prompt)))


@dataclass(frozen=True)
class Chunk:
    """Some rows of one source, the columns that it has, and those that are kept (as long as `rows`)."""

    rows: Sequence[SourceRow]
    names: frozenset[str] = frozenset()
    kept: pa.Table | None = None

    def take(self, count: int) -> Chunk:
        return Chunk(self.rows[:count], self.names, None if self.kept is None else self.kept.slice(0, count))


def group_into_chunks(
    rows: Iterable[SourceRow], keep: Sequence[str] = (), names: frozenset[str] | None = None
) -> Iterator[Chunk]:
    """Yield chunks of rows whose columns are `names` or else those of their `values`."""
    remaining = iter(rows)
    while some := list(islice(remaining, ROWS_PER_CHUNK)):
        found = names if names is not None else frozenset(name for row in some for name in row.values)
        yield Chunk(some, found, pa.table({name: _array(some, name) for name in keep}) if keep else None)


def _array(rows: Sequence[SourceRow], name: str) -> pa.Array:
    try:
        return pa.array([row.values.get(name) for row in rows])
    except (pa.ArrowException, OverflowError) as error:
        raise SourceError(
            f"column {name!r} holds values of several types between {rows[0].id} and {rows[-1].id} ({error}); "
            "make them one type or leave it out of --keep-columns"
        ) from error


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse untrusted JSON. Raises ValueError, which JSON and Unicode errors are."""
    text = data.decode("utf-8-sig")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(values, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if "\\ud" in text.lower():
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair cannot be stored
    return values


def _is_deeper(value: Any, levels: int) -> bool:
    if levels == 0:
        return True
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_is_deeper(item, levels - 1) for item in below)


def to_text(value: Any) -> str | None:
    """Return a value as an id or a prompt, None if it is empty."""
    if value is None or value == "":
        return None
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


@contextmanager
def raise_source_errors(uri: str, form: str = "") -> Iterator[None]:
    """Raise SourceError for what keeps `uri` from being read as a file of this form."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {store.redact(uri)}{form}: {str(error) or 'it is empty'}") from error


def escape_name(name: str) -> str:
    """Return the name of a file as text that a column can hold: bytes that are not UTF-8 are written as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
