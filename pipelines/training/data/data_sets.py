"""List the rows of one or several data sets: JSON files, tables and tar shards, each row parsed or with its error."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from ovis_model.inputs.prompt import IMAGE_MARK
from pipelines.config import Section, wrap_one
from pipelines.errors import SourceError
from pipelines.media.inline import is_inline
from pipelines.media.reference import FileRef, ImageRef, resolve_path
from pipelines.sources.json_elements import Element, split_file
from pipelines.sources.json_images import make_reference
from pipelines.sources.kinds import detect_kind
from pipelines.sources.rows import ColumnRoles, SourceRow, parse_json_object, raise_source_errors
from pipelines.sources.selection import GLOB_CHARACTERS
from pipelines.sources.tables import list_arrow, list_parquet
from pipelines.sources.tar import list_tar
from pipelines.storage import store
from pipelines.storage.store import FileInfo
from pipelines.storage.table_reader import get_processes
from pipelines.storage.yaml_file import read_yaml
from pipelines.training.data.forms import FIELDS, Dialogue, Refer, parse_dialogue

CAPTION_TEMPLATE = f"{IMAGE_MARK}\nDescribe the image."
CaptionForm = Literal["dialogue", "plain"]
"""Whether captions are answers of a chat, or plain text after the template as in the first stages of Ovis."""

_BLOCK_BYTES, _MAX_ELEMENT_BYTES = 8 << 20, 16 << 20
_TABLES = ("parquet", "arrow", "tar", "tgz")


class DataSet(Section):
    """Files of rows, and how often each row is seen in an epoch."""

    title: ClassVar[str] = "data set"

    name: str
    files: tuple[str, ...] = Field(min_length=1)
    image_root: str | None = None
    caption_template: str = CAPTION_TEMPLATE
    caption_form: CaptionForm = "dialogue"
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0

    _wrap_files = field_validator("files", mode="before")(wrap_one)

    @field_validator("image_root")
    @classmethod
    def _make_absolute(cls, value: str | None) -> str | None:
        return None if value is None else store.make_absolute(value)

    @field_validator("caption_template")
    @classmethod
    def _check_mark(cls, value: str) -> str:
        if value.count(IMAGE_MARK) > 1:
            raise ValueError(f"holds {value.count(IMAGE_MARK)} marks {IMAGE_MARK}; a caption is of one image")
        return value


class ListedRow(NamedTuple):
    """A row of a data set: where it stands in a file, and its content, or the `error` in its place."""

    data_set: int
    uri: str
    place: str
    dialogue: Dialogue | None = None
    error: str = ""


def read_data_sets(inputs: Sequence[str], **defaults: Any) -> list[DataSet]:
    """Return the data sets that INPUT names: a YAML file lists several, other inputs are one each.

    defaults: of the fields image_root, caption_template and caption_form. Raise ValueError.
    """
    found: list[DataSet] = []
    for uri in inputs:
        if uri.endswith((".yaml", ".yml")):
            found += _read_registry(uri, defaults)
        else:
            found.append(DataSet(name=uri, files=(uri,), **defaults))
    return found


def _read_registry(path: str, defaults: Mapping[str, Any]) -> list[DataSet]:
    """Read `NAME: {files, image_root, caption_template, weight}` entries; upstream's meta_file and image_dir too."""
    entries = read_yaml(path)
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path} must hold data sets as `NAME: {{files: FILE, weight: 1.0}}`")
    return [_read_entry(path, str(name), values, defaults) for name, values in entries.items()]


def _read_entry(path: str, name: str, values: Any, defaults: Mapping[str, Any]) -> DataSet:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {name} must hold fields such as files and weight")
    renamed = {"meta_file": "files", "image_dir": "image_root"}
    fields = {renamed.get(key := str(k).replace("-", "_"), key): v for k, v in values.items() if k != "data_format"}
    try:
        return DataSet(name=name, **{**defaults, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {name}, {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def list_short_names(data_sets: Sequence[DataSet]) -> list[str]:
    """Return a name for each data set that fits into that of a metric: a file's without directory and suffix."""
    names = [re.sub(r"[^\w-]+", "_", data_set.name.rpartition("/")[2].partition(".")[0]) for data_set in data_sets]
    return [f"{name}_{at}" if not name or name in names[:at] else name for at, name in enumerate(names)]


def list_training_rows(data_sets: Sequence[DataSet]) -> Iterator[ListedRow]:
    """Yield the rows of all data sets, in order. Raise SourceError for a file that cannot be opened."""
    for number, data_set in enumerate(data_sets):
        for info in [info for uri in data_set.files for info in _expand(uri)]:
            yield from _list_file(info, number, data_set)


def _expand(uri: str) -> list[FileInfo]:
    if info := store.find_file(uri):
        return [info]
    if GLOB_CHARACTERS & set(uri) and (infos := store.glob_files(uri)):
        return infos
    raise SourceError(
        f"training data {store.redact(uri)!r} does not exist; give a JSON, JSON lines, Parquet or tar file, or a glob"
    )


def _list_file(info: FileInfo, number: int, data_set: DataSet) -> Iterator[ListedRow]:
    kind = detect_kind(info.uri)
    if kind in ("json", "jsonl"):
        return _list_json(info, number, data_set)
    if kind in _TABLES:
        return _list_table(info, kind, number, data_set)
    raise SourceError(f"{store.redact(info.uri)} holds no rows; give .json, .jsonl, .parquet, .arrow or .tar files")


def _list_json(info: FileInfo, number: int, data_set: DataSet) -> Iterator[ListedRow]:
    at = "the start"
    with raise_source_errors(info.uri), store.open_file(info.uri, block_bytes=_BLOCK_BYTES) as file:
        is_gzip = store.strip_query(info.uri).lower().endswith(".gz")
        read = gzip.GzipFile(fileobj=file).read1 if is_gzip else file.read
        try:
            for element in split_file(info.uri, read, _MAX_ELEMENT_BYTES):
                at = f"{element.unit} {element.number}"
                yield _parse_element(info.uri, element, number, data_set)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            yield ListedRow(number, info.uri, at, error=f"the file is damaged after {at}: {error}")


def _parse_element(uri: str, element: Element, number: int, data_set: DataSet) -> ListedRow:
    def parse() -> Dialogue:
        if element.error:
            raise ValueError(element.error)
        refer = partial(_refer, uri, data_set.image_root, element)
        return _parse(parse_json_object(element.data), refer, (), data_set)

    return _make_row(number, uri, f"{element.unit} {element.number}", parse)


def _make_row(number: int, uri: str, place: str, parse: Callable[[], Dialogue]) -> ListedRow:
    try:
        return ListedRow(number, uri, place, parse())
    except ValueError as error:
        return ListedRow(number, uri, place, error=str(error))


def _refer(uri: str, image_root: str | None, element: Element, image: Any) -> ImageRef:
    """Refer to the image that an element names or holds; relative paths start at `image_root`."""
    if isinstance(image, dict) and isinstance(image.get("url"), str):  # OpenAI's image_url
        image = image["url"]
    if isinstance(image, str) and image and image_root is not None and not is_inline(image):
        return FileRef(resolve_path(image, store.join(image_root, "-")))
    return make_reference(uri, image, element)


def _list_table(info: FileInfo, kind: str, number: int, data_set: DataSet) -> Iterator[ListedRow]:
    columns = _Columns(keep=tuple(_find_fields(info.uri, kind)), may_be_columns=False)
    if kind in ("tar", "tgz"):
        chunks = list_tar(info, columns, is_gzip=kind == "tgz")
    else:
        chunks = (list_parquet if kind == "parquet" else list_arrow)(info, columns)
    for chunk in chunks:
        kept: list[dict[str, Any]] = chunk.kept.to_pylist() if chunk.kept is not None else [{}] * len(chunk.rows)
        for row, values in zip(chunk.rows, kept, strict=True):
            yield _parse_source_row(info.uri, row, values, number, data_set)


class _Columns(ColumnRoles):
    """Columns of a table of dialogues: a row may have no image and needs no prompt of its own."""

    def make_row(
        self, source: str, number: object, values: Mapping[str, Any], images: tuple[ImageRef, ...], *, unit: str
    ) -> SourceRow:
        """Build the row at `number` of `source`."""
        return SourceRow(f"{unit} {number}", source, images, None, values)


def _find_fields(uri: str, kind: str) -> list[str]:
    """Return the fields to read: of a table those that it has, of a tar any, as its sidecars may have them."""
    if kind in ("tar", "tgz"):
        return list(FIELDS)
    with raise_source_errors(uri):
        open_table = get_processes().open_parquet if kind == "parquet" else get_processes().open_arrow
        with open_table(uri) as file:
            names = set(file.schema.names)
    return [name for name in FIELDS if name in names and name not in ("image", "images", "video", "videos")]


def _parse_source_row(uri: str, row: SourceRow, values: Mapping[str, Any], number: int, data_set: DataSet) -> ListedRow:
    if row.error:
        return ListedRow(number, uri, row.id, error=row.error)
    refer = partial(_refer_to_path, uri, data_set.image_root)
    images = [_move(image, uri, data_set.image_root) for image in row.images]
    given = {name: value for name, value in values.items() if name not in ("image", "images", "image_path")}
    return _make_row(number, uri, row.id, lambda: _parse(given, refer, images, data_set))


def _parse(values: Mapping[str, Any], refer: Refer, images: Sequence[ImageRef], data_set: DataSet) -> Dialogue:
    row = parse_dialogue(values, refer, images, caption_template=data_set.caption_template)
    return replace(row, is_caption=row.is_caption and data_set.caption_form == "plain")


def _refer_to_path(uri: str, image_root: str | None, image: Any) -> ImageRef:
    path = image.get("url") or image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str) or not path or is_inline(path):
        raise ValueError(f"an image in a turn must be a path or a URI, not {str(image)[:80]!r}")
    return FileRef(resolve_path(path, uri if image_root is None else store.join(image_root, "-")))


def _move(image: ImageRef, uri: str, image_root: str | None) -> ImageRef:
    """Return the reference to a file that a table names relative to `image_root`."""
    folder = store.strip_query(uri).rpartition("/")[0]
    if image_root is None or not isinstance(image, FileRef) or not image.uri.startswith(f"{folder}/"):
        return image
    return FileRef(resolve_path(image.uri[len(folder) + 1 :], store.join(image_root, "-")))


def describe_data_sets(data_sets: Sequence[DataSet]) -> str:
    """Return the data sets as JSON, for the run's record."""
    return json.dumps([data_set.model_dump(mode="json") for data_set in data_sets])
