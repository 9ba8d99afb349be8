"""Turn a benchmark's TSV file into a Parquet file of items, one at a time: prompt, images and the other columns."""

from __future__ import annotations

import base64
import csv
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ovis_model.inputs.prompt import remove_marks
from ovis_model.wording import count_nouns
from pipelines.evaluation.benchmarks import Dataset, Size
from pipelines.evaluation.config import IMAGES, PROMPT
from pipelines.evaluation.files import MAX_INDEX_CHARACTERS, leads_out
from pipelines.evaluation.prompts import ask_video_mme, place_images
from pipelines.evaluation.scoring.scores import Item, get_index, is_missing, parse_list
from pipelines.evaluation.tsv import MAX_ROW_BYTES, stream_rows
from pipelines.evaluation.videos import Frames, read_subtitles
from pipelines.storage import store

Image = dict[str, Any]
"""An image as Hugging Face's struct: its bytes, or the path of its file."""

_GROUP_BYTES = 16 << 20  # of images, in a row group of the file of items
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

logger = logging.getLogger(__name__)


def write_items(dataset: Dataset, items: Sequence[Item], data: str, image_root: str, size: Size, uri: str) -> None:
    """Write items to the Parquet file `uri`. Raise ValueError for a reference to an image that leads nowhere.

    An image that cannot be decoded stays as it is: its row becomes an error row.
    """
    with Path(data).open("rb") as file:
        images = ImageCells(file, locate_rows(data), image_root)
        _write_parquet(
            uri, _make_schema(items[0]), (_make_row(dataset, item, images.read(item), size) for item in items)
        )


def write_video_items(
    dataset: Dataset, items: Sequence[Item], frames: Mapping[str, Frames], subtitles_root: str | None, uri: str
) -> None:
    """Write items about videos to the Parquet file `uri`, with the frames of each: index -> frames.

    subtitles_root: where `subtitle_path` leads from; None to show no subtitles. Raise ValueError if one is unreadable.
    """
    rows = (_make_video_row(dataset, item, frames[get_index(item)], subtitles_root) for item in items)
    _write_parquet(uri, _make_schema(items[0]), rows)


def _make_video_row(dataset: Dataset, item: Item, frames: Frames, subtitles_root: str | None) -> dict[str, Any]:
    assert dataset.ask_about_video is not None
    plain = {name: remove_marks(value) if isinstance(value, str) else value for name, value in item.items()}
    count = len(frames.uris)
    if subtitles_root is None:
        query = dataset.ask_about_video(plain, count)
    else:
        query = ask_video_mme(plain, count, read_subtitles(item, frames, subtitles_root))
    images: list[Image] = [{"bytes": None, "path": frame} for frame in frames.uris]
    return {**_keep_columns(item), PROMPT: query, IMAGES: images}


def _keep_columns(item: Item) -> dict[str, str | None]:
    return {str(name): None if is_missing(value) else str(value) for name, value in item.items()}


def select_illustrated(items: Sequence[Item], data: str) -> list[Item]:
    """Return the items that have an image, and log how many have none. Raise ValueError if none has.

    Where the file has both columns, `image` decides.
    """
    column = "image" if "image" in items[0] else "image_path"
    found = [item for item in items if not is_missing(item.get(column))]
    if not found:
        raise ValueError(f"{data}: no row has an image; the columns image and image_path are missing or empty")
    if len(found) < len(items):
        logger.warning("left out %s of %s without an image", count_nouns(len(items) - len(found), "row"), data)
    return found


def _make_row(dataset: Dataset, item: Item, images: list[Image], size: Size) -> dict[str, Any]:
    assert dataset.ask is not None
    text = remove_marks(dataset.ask(item, dataset.make_style(size)))  # in a question they are plain text
    try:
        placed = place_images(text, len(images), numbered=dataset.has_numbered_images)
    except ValueError as error:
        raise ValueError(f"{dataset.name}, index {item['index']}: {error}") from error
    return {**_keep_columns(item), PROMPT: placed.query, IMAGES: [images[place] for place in placed.images]}


def _make_schema(item: Item) -> pa.Schema:
    fields = [pa.field(str(name), pa.string()) for name in item]
    return pa.schema([*fields, pa.field(PROMPT, pa.string()), pa.field(IMAGES, pa.list_(_IMAGE_TYPE))])


class ImageCells:
    """The images of a TSV file, read one row at a time."""

    def __init__(self, file: BinaryIO, places: Mapping[str, tuple[int, int]], image_root: str) -> None:
        """`places`: index -> the bytes [start, stop) of its row; "" is the header."""
        self._file, self._places, self._root = file, places, image_root
        self._names = self._read_cells("")

    def read(self, item: Item) -> list[Image]:
        """Return the images of an item that has some. Raise ValueError for a reference that leads nowhere."""
        if "image" not in item:
            return [self._refer_to(path) for path in _split_list(str(item["image_path"]))]
        return [_decode(text) for text in _split_list(self._read_image(get_index(item)))]

    def _read_image(self, index: str) -> str:
        cell = self._read_cell(index)
        if len(cell) > MAX_INDEX_CHARACTERS:
            return cell
        if cell not in self._places or len(found := self._read_cell(cell)) <= MAX_INDEX_CHARACTERS:
            raise ValueError(f"the image of index {index} is that of index {cell}, which has none")
        return found

    def _read_cell(self, index: str) -> str:
        return self._read_cells(index)[self._names.index("image")]

    def _read_cells(self, index: str) -> list[str]:
        start, stop = self._places[index]
        self._file.seek(start)
        text = self._file.read(stop - start).decode("utf-8-sig")
        return next(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))

    def _refer_to(self, path: str) -> Image:
        if leads_out(path):
            raise ValueError(f"image_path {path!r} leads out of the directory of images; give paths below --image-root")
        return {"bytes": None, "path": store.join(self._root, path)}


def locate_rows(data: str) -> dict[str, tuple[int, int]]:
    """Return {index: the bytes of its row}, with the header under ""."""
    csv.field_size_limit(MAX_ROW_BYTES)
    rows = stream_rows(data)
    header = next(rows)
    place = list(header.cells).index("index")
    return {"": (header.start, header.stop), **{row.cells[place]: (row.start, row.stop) for row in rows}}


def _split_list(cell: str) -> list[str]:
    return [str(part) for part in parse_list(cell)] if cell.startswith("[") else [cell]


def _decode(text: str) -> Image:
    """Decode base64. What is not base64 is kept, so that decoding it as an image reports what is wrong."""
    try:
        return {"bytes": base64.b64decode(text.partition(";base64,")[2] or text), "path": None}
    except ValueError:
        return {"bytes": text.encode(), "path": None}


def _write_parquet(uri: str, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        local = Path(directory) / "items.parquet"
        with pq.ParquetWriter(local, schema, compression="none") as writer:
            for group in _group_by_bytes(rows):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        fs, path = store.open_store(uri)
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(local), path)


def _group_by_bytes(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    waiting, num_bytes = [], 0
    for row in rows:
        waiting.append(row)
        num_bytes += sum(len(image["bytes"] or b"") for image in row[IMAGES])
        if num_bytes > _GROUP_BYTES:
            yield waiting
            waiting, num_bytes = [], 0
    if waiting:
        yield waiting
