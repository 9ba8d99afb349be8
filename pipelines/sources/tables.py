"""Tables of Arrow types: which of their columns are what, and a batch of one as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.errors import SourceError
from pipelines.media.reference import CellRef, FileRef, ImageRef, resolve
from pipelines.sources.rows import Chunk, Columns
from pipelines.storage import store

_URI_COLUMNS = "image images uri image_uri url image_url path image_path file_name video video_url video_path"


@dataclass(frozen=True)
class Table:
    """A shard whose columns are known. `image` is the column that holds images, `holds_uris` by their URIs."""

    uri: str
    columns: Columns
    names: frozenset[str]
    image: str | None
    holds_uris: bool

    @classmethod
    def of(cls, uri: str, schema: pa.Schema, columns: Columns) -> Table:
        """Find the columns. Raises SourceError if one that is asked for is missing or ambiguous."""
        names = frozenset(schema.names)
        if doubled := sorted(name for name in names if schema.names.count(name) > 1):
            raise SourceError(f"{store.shown(uri)} has several columns named {', '.join(doubled)}; rename them")
        if missing := sorted(columns.wanted - names):
            braces = " ({{ and }} in prompts stand for braces)" if columns.in_prompt - names else ""
            raise SourceError(f"{store.shown(uri)} has no column {', '.join(missing)}{braces}; {_describe(schema)}")
        image = _image_column(uri, schema, columns.image)
        return cls(uri, columns, names, image, image is not None and _holds_uris(schema.field(image).type))

    @property
    def read(self) -> list[str]:
        """Return the columns that are read while listing: that of the images only if it holds URIs."""
        return sorted(self.columns.wanted.union([self.image] if self.image and self.holds_uris else []))

    def chunk(self, batch: pa.RecordBatch, at: int, cells: Sequence[CellRef]) -> Chunk:
        """Return the rows of a batch of the columns `read`; the first is row `at`, `cells` are their images."""
        values = batch.select(sorted(self.columns.looked_at)).to_pylist() or [{}] * len(cells)
        images = self._images(batch, cells)
        numbered = enumerate(zip(values, images, strict=True), at)
        rows = [self.columns.row(self.uri, i, *row, what="row") for i, row in numbered]
        keep = list(self.columns.keep)
        return Chunk(rows, self.names, pa.Table.from_batches([batch.select(keep)]) if keep else None)

    def _images(self, batch: pa.RecordBatch, cells: Sequence[CellRef]) -> Sequence[tuple[ImageRef, ...]]:
        if self.image is None:
            return [()] * len(cells)
        if not self.holds_uris:
            return [(cell,) for cell in cells]
        values = map(_flat, batch.column(self.image).to_pylist())
        return [tuple(FileRef(resolve(path, self.uri)) for path in paths if path) for paths in values]


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _image_column(uri: str, schema: pa.Schema, given: str | None) -> str | None:
    """Return the column of images, None for "". Raises SourceError with the candidates unless there is just one."""
    if given == "":
        return None
    if given is not None:
        if given in schema.names and (_holds_bytes(schema.field(given).type) or _holds_uris(schema.field(given).type)):
            return given
        raise SourceError(f"{store.shown(uri)}: column {given!r} holds neither bytes nor URIs; {_describe(schema)}")
    holders = [field.name for field in schema if _holds_bytes(field.type)]
    candidates: list[str] = holders or [
        f.name for f in schema if f.name.lower() in _URI_COLUMNS.split() and _holds_uris(f.type)
    ]
    if len(candidates) != 1:
        found = f"{', '.join(candidates)} may all be" if candidates else "no column looks like"
        raise SourceError(
            f"{store.shown(uri)}: {found} the images; name the column with --image-column, or '' for none; "
            f"{_describe(schema)}"
        )
    return candidates[0]


def _describe(schema: pa.Schema) -> str:
    return "it has " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def _holds_bytes(type_: pa.DataType) -> bool:
    """Return whether it holds bytes, Hugging Face's struct of bytes and path, or a list of either."""
    item = _item_type(type_)
    if pa.types.is_struct(item):
        return item.get_field_index("bytes") >= 0 and _is_binary(item.field("bytes").type)
    return _is_binary(item)


def _holds_uris(type_: pa.DataType) -> bool:
    item = _item_type(type_)
    if pa.types.is_dictionary(item):
        item = item.value_type
    return bool(pa.types.is_string(item) or pa.types.is_large_string(item) or pa.types.is_string_view(item))


def _item_type(type_: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return type_.value_type if is_list else type_


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))
