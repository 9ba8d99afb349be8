"""Parquet: a row is a row; cells of images are left where they are, to be read by row group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import store
from pipelines.sources.rows import (
    ROWS_PER_CHUNK,
    Chunk,
    Columns,
    ImageRef,
    Row,
    SourceError,
    resolve,
    row_error,
    text_of,
)
from pipelines.store import FileInfo

BUFFER_BYTES = 1 << 20  # or a column of a row group would be held whole
_URI_NAMES = (
    "image",
    "images",
    "uri",
    "image_uri",
    "url",
    "image_url",
    "path",
    "image_path",
    "video",
    "video_url",
    "video_path",
)


def list_parquet(info: FileInfo, columns: Columns) -> Iterator[Chunk]:
    """Reads the columns that are asked for; that of the images only if it holds URIs."""
    try:
        with store.open_file(info.uri) as file:
            parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
            yield from _chunks(info.uri, parquet, columns)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {info.uri} as Parquet: {error}") from error


def _chunks(uri: str, parquet: pq.ParquetFile, columns: Columns) -> Iterator[Chunk]:
    schema = parquet.schema_arrow
    names = frozenset(schema.names)
    if doubled := sorted(name for name in names if schema.names.count(name) > 1):
        raise SourceError(f"{uri} has several columns named {', '.join(doubled)}; rename them")
    if missing := sorted(columns.wanted - names):
        braces = " ({{ and }} in --prompt stand for braces)" if columns.in_prompt - names else ""
        raise SourceError(f"{uri} has no column {', '.join(missing)}{braces}; {_describe(schema)}")
    image = _image_column(uri, schema, columns.image)
    holds_uris = image is not None and _holds_uris(schema.field(image).type)
    read = sorted(columns.wanted.union([image] if image and holds_uris else []))
    at = 0
    for batch in parquet.iter_batches(ROWS_PER_CHUNK, columns=read):
        cells = batch.select(sorted(_needed(columns))).to_pylist()
        paths = batch.column(image).to_pylist() if holds_uris else None
        rows = [_row(uri, at + i, cell, image, paths and [paths[i]], columns) for i, cell in enumerate(cells)]
        kept = pa.Table.from_batches([batch.select(list(columns.keep))]) if columns.keep else None
        yield Chunk(rows, names, kept)
        at += len(rows)


def _needed(columns: Columns) -> frozenset[str]:
    """Columns whose values are looked at here."""
    return columns.in_prompt.union(filter(None, (columns.id, columns.prompt)))


def _row(
    uri: str, number: int, cell: dict[str, Any], image: str | None, paths: list[Any] | None, columns: Columns
) -> Row:
    prompt = text_of(cell.get(columns.prompt or ""))
    images: tuple[ImageRef, ...] = ()
    if paths is not None:
        images = tuple(ImageRef("file", resolve(path, uri)) for path in _flat(paths[0]) if path)
    elif image:
        images = (ImageRef("parquet", uri, member=image, row=number),)
    return Row(
        id=text_of(cell.get(columns.id or "")) or f"{uri}#{number}",
        uri=images[0].uri if images else uri,
        images=images,
        prompt=prompt,
        values=cell,
        error=row_error(images, prompt, f"row {number}"),
    )


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _image_column(uri: str, schema: pa.Schema, given: str | None) -> str | None:
    """The column that holds images, None for "". Raises SourceError with the candidates unless there is just one."""
    if given == "":
        return None
    if given is not None:
        if given in schema.names and (_holds_bytes(schema.field(given).type) or _holds_uris(schema.field(given).type)):
            return given
        raise SourceError(f"{uri}: column {given!r} holds neither bytes nor URIs; {_describe(schema)}")
    holders = [field.name for field in schema if _holds_bytes(field.type)]
    candidates: list[str] = holders or [f.name for f in schema if f.name.lower() in _URI_NAMES and _holds_uris(f.type)]
    if len(candidates) != 1:
        found = f"{', '.join(candidates)} may all be" if candidates else "no column looks like"
        raise SourceError(
            f"{uri}: {found} the images; name the column with --image-column, or '' for none; {_describe(schema)}"
        )
    return candidates[0]


def _describe(schema: pa.Schema) -> str:
    return "it has " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def _holds_bytes(type_: pa.DataType) -> bool:
    """Bytes, Hugging Face's struct of bytes and path, or a list of either."""
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
