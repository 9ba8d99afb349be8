"""The formats of an export: each writes parts of items, and may join what its parts left.

A part is written under names of its own, so a part that is written again replaces itself.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.export.dataset_card import make_card
from pipelines.export.features import describe_features
from pipelines.export.items import ExportItem
from pipelines.export.options import FormatName
from pipelines.storage import store

Json = dict[str, Any]
Lines = Sequence[str]
"""What a part leaves for the file of all parts: a JSON object per line."""

IMAGES = "images"
_WRITES_AT_ONCE = 16
_MEDIA_COLUMN = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Format:
    """write_part: write some items below a directory; return lines to join. join: yield the bytes of the joint file."""

    write_part: Callable[[str, int, Sequence[ExportItem]], Lines]
    file_name: str = ""
    join: Callable[[Iterator[str]], Iterator[bytes]] = lambda lines: iter(())


def write_webdataset(target: str, part: int, items: Sequence[ExportItem]) -> Lines:
    """Write a tar in which each row is KEY.SUFFIX per image, KEY.txt with the caption and KEY.json with all columns."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for item in items:
            for place, media in enumerate(item.media):
                _add_member(tar, f"{item.key}.{_number(place, item)}{media.suffix}", media.data)
            _add_member(tar, f"{item.key}.txt", item.caption.encode())
            _add_member(tar, f"{item.key}.json", _to_line(item.values).encode())
    store.write_bytes(store.join(target, f"shard-{part:06}.tar"), buffer.getvalue())
    return ()


def write_parquet(target: str, part: int, items: Sequence[ExportItem]) -> Lines:
    """Write a Parquet file of a Hugging Face dataset: all columns with their types, and the images as structs."""
    table = pa.concat_tables([item.table for item in items])
    if items[0].media or any(item.media for item in items):
        cells = [
            [
                {"bytes": each.data, "path": f"{item.key}.{_number(n, item)}{each.suffix}"}
                for n, each in enumerate(item.media)
            ]
            for item in items
        ]
        name = "image" if "image" not in table.column_names else "exported_image"
        is_single = all(len(cell) <= 1 for cell in cells)
        column = (
            pa.array([cell[0] if cell else None for cell in cells], _MEDIA_COLUMN)
            if is_single
            else pa.array(cells, pa.list_(_MEDIA_COLUMN))
        )
        table = table.append_column(name, column)
    features = describe_features(table.schema)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd", row_group_size=100)
    store.write_bytes(store.join(target, "data", f"train-{part:06}.parquet"), buffer.getvalue())
    return ()


def write_jsonl(target: str, part: int, items: Sequence[ExportItem]) -> Lines:
    """Write the images; leave an object per row with all columns and the paths of its images."""
    _write_all(target, part, items)
    return [_to_line({**item.values, **_name_media(_list_paths(part, item), item)}) for item in items]


def write_llava(target: str, part: int, items: Sequence[ExportItem]) -> Lines:
    """Write the images; leave a conversation per row with a turn per task."""
    _write_all(target, part, items)
    return [_to_line(_make_conversation(item, _list_paths(part, item))) for item in items]


def write_coco(target: str, part: int, items: Sequence[ExportItem]) -> Lines:
    """Write the images; leave an entry of `images` with its caption per row."""
    _write_all(target, part, items)
    lines = []
    for item in items:
        values = item.values
        paths = _list_paths(part, item) or [values["uri"]]
        width, height = _measure(item) if item.media else (values.get("width"), values.get("height"))
        image = {"id": item.row, "file_name": paths[0], "width": width, "height": height, "row_id": values["id"]}
        lines.append(_to_line({"image": image, "caption": item.caption}))
    return lines


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _number(place: int, item: ExportItem) -> str:
    """Return what tells the images of a row apart; nothing if there is one."""
    return f"{place}." if len(item.media) > 1 else ""


def _list_paths(part: int, item: ExportItem) -> list[str]:
    """Return the paths of a row's media below the target."""
    paths = []
    for place, media in enumerate(item.media):
        paths.append(f"{IMAGES}/{part:06}/{item.key}.{_number(place, item)}{media.suffix}".replace("..", "."))
    return paths


def _write_all(target: str, part: int, items: Sequence[ExportItem]) -> None:
    """Write the media of all items, several at once."""
    files = [
        (store.join(target, *path.split("/")), media.data)
        for item in items
        for path, media in zip(_list_paths(part, item), item.media, strict=True)
    ]
    with ThreadPoolExecutor(_WRITES_AT_ONCE) as pool:
        list(pool.map(lambda file: store.write_bytes(*file), files))


def _name_media(paths: Sequence[str], item: ExportItem) -> Json:
    if not paths:
        return {}
    return {"image": paths[0] if len(paths) == 1 else list(paths)}


def _make_conversation(item: ExportItem, paths: Sequence[str]) -> Json:
    is_video = bool(paths) and item.media[0].suffix in ("mp4", "webm", "mov", "mkv", "avi")
    mark = ("<video>" if is_video else "<image>") + "\n"
    turns = []
    for number, (question, answer) in enumerate(item.turns):
        begin = mark * len(paths) if number == 0 else ""
        turns += [{"from": "human", "value": begin + question}, {"from": "gpt", "value": answer}]
    media = {"video" if is_video else "image": paths[0] if len(paths) == 1 else list(paths)} if paths else {}
    return {"id": item.values["id"], **media, "conversations": turns}


def _measure(item: ExportItem) -> tuple[int, int]:
    with Image.open(io.BytesIO(item.media[0].data)) as image:
        return image.width, image.height


def _to_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _join_lines(lines: Iterator[str]) -> Iterator[bytes]:
    for line in lines:
        yield f"{line}\n".encode()


def _join_list(lines: Iterator[str]) -> Iterator[bytes]:
    yield b"[\n"
    for number, line in enumerate(lines):
        yield f"{',' * (number > 0)}{line}\n".encode()
    yield b"]\n"


def _join_coco(lines: Iterator[str]) -> Iterator[bytes]:
    """Yield a COCO file of captions. The captions are collected, as they follow all images."""
    captions = []
    yield b'{"info": {"description": "exported by ovis2"}, "licenses": [], "images": [\n'
    for number, line in enumerate(lines):
        entry = json.loads(line)
        captions.append((entry["image"]["id"], entry["caption"]))
        yield f"{',' * (number > 0)}{_to_line(entry['image'])}\n".encode()
    yield b'], "annotations": [\n'
    for number, (row, caption) in enumerate(captions):
        line = _to_line({"id": row, "image_id": row, "caption": caption})
        yield f"{',' * (number > 0)}{line}\n".encode()
    yield b"]}\n"


def _join_csv(lines: Iterator[str]) -> Iterator[bytes]:
    """Yield a CSV file with the columns of the first row; lists and objects are JSON text."""
    names: list[str] = []
    for line in lines:
        values: Mapping[str, Any] = json.loads(line)
        if not names:
            names = [*values, *["image"] * ("image" not in values)]
            yield _to_csv(names)
        yield _to_csv([_to_cell(values.get(name)) for name in names])


def _to_cell(value: Any) -> Any:
    return _to_line(value) if isinstance(value, dict | list) else value


def _to_csv(cells: Sequence[Any]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


FORMATS: Mapping[FormatName, Format] = {
    "webdataset": Format(write_webdataset),
    "hf": Format(write_parquet, "README.md", make_card),
    "llava": Format(write_llava, "llava.json", _join_list),
    "coco": Format(write_coco, "captions.json", _join_coco),
    "csv": Format(write_jsonl, "rows.csv", _join_csv),
    "jsonl": Format(write_jsonl, "rows.jsonl", _join_lines),
}
