"""What a source says of its rows: identity, references to images, the text of a prompt and columns. No payload."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.errors import SourceError
from pipelines.media.reference import ImageRef

ROWS_PER_CHUNK = 1 << 12
MAX_DEPTH = 40  # of JSON; Arrow stores columns that are nested up to 64 deep


@dataclass(frozen=True)
class Row:
    """One row to be. `prompt` is its own, None if it has none; `error` says why it cannot even be read."""

    id: str
    uri: str
    images: tuple[ImageRef, ...] = ()
    prompt: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Columns:
    """Which columns of the input are what. None or empty: not asked for."""

    id: str | None = None
    image: str | None = None
    prompt: str | None = None
    keep: tuple[str, ...] = ()
    in_prompt: frozenset[str] = frozenset()

    @property
    def wanted(self) -> frozenset[str]:
        """All but the images: what the listing must read."""
        return self.in_prompt.union(self.keep, filter(None, (self.id, self.prompt)))


@dataclass(frozen=True)
class Chunk:
    """Some rows of one source, the columns that it has, and those that are kept (as long as `rows`)."""

    rows: Sequence[Row]
    names: frozenset[str] = frozenset()
    kept: pa.Table | None = None

    def first(self, count: int) -> Chunk:
        return Chunk(self.rows[:count], self.names, None if self.kept is None else self.kept.slice(0, count))


def chunks_of(rows: Iterable[Row], keep: Sequence[str] = (), names: frozenset[str] | None = None) -> Iterator[Chunk]:
    """Chunks of rows whose columns are `names` or those of their `values`, where the types of the kept are found."""
    remaining = iter(rows)
    while some := list(islice(remaining, ROWS_PER_CHUNK)):
        found = names if names is not None else frozenset(name for row in some for name in row.values)
        yield Chunk(some, found, pa.table({name: _array(some, name) for name in keep}) if keep else None)


def _array(rows: Sequence[Row], name: str) -> pa.Array:
    try:
        return pa.array([row.values.get(name) for row in rows])
    except (pa.ArrowException, OverflowError) as error:
        raise SourceError(
            f"column {name!r} holds values of several types between {rows[0].id} and {rows[-1].id} ({error}); "
            "make them one type or leave it out of --keep-columns"
        ) from error


def json_object(data: bytes) -> dict[str, Any]:
    """What a JSON text from a stranger holds. Raises ValueError, which JSON and Unicode errors are."""
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


def text_of(value: Any) -> str | None:
    """A value as an id or a prompt; None if there is none."""
    if value is None or value == "":
        return None
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def row_error(images: Sequence[ImageRef], prompt: str | None, where: str) -> str:
    """A row needs an image or a question of its own: asking the run's question about nothing helps nobody."""
    return "" if images or prompt else f"{where}: no image, and no prompt of its own"
