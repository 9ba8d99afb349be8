"""Feed mutated files to the real readers, in a process that may crash.

    python -m tests.stress.fuzz KIND FIRST LAST

KIND is images, tars, tables, json or trees (directories); each number from FIRST to LAST is the seed of a file. Prints
a line of JSON before and after each file, and exits with 1 at the first that gives neither rows nor an error that names
the file, or an error that is more than one sentence.
"""

from __future__ import annotations

import base64
import faulthandler
import gzip
import io
import json
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.config import CaptionConfig
from pipelines.errors import MediaError, SourceError
from pipelines.media.fetch import Fetcher
from pipelines.media.images import decode_image
from pipelines.media.reference import parse_reference
from pipelines.sources import list_rows
from pipelines.sources.kinds import IMAGE_SUFFIXES
from pipelines.sources.rows import escape_name
from tests.stress.corpus import find_faults
from tests.stress.mutations import mutate
from tests.stress.trees import make_tree
from tests.support.photographs import find_photographs

LIMIT_S = 20.0  # per file, on a shared machine

_HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SAVED = (
    ("JPEG", "RGB", {"quality": 85}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("JPEG", "L", {"comment": "x" * 300}),
    ("MPO", "RGB", {"save_all": True}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "I;16", {}),
    ("WEBP", "RGB", {"quality": 80}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {"save_all": True, "duration": 50}),
    ("GIF", "P", {"save_all": True, "duration": 50}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "I;16", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "F", {}),
    ("TIFF", "1", {"compression": "group4"}),
    ("BMP", "RGB", {}),
    ("PPM", "RGB", {}),
    ("TGA", "RGB", {"compression": "tga_rle"}),
    ("ICO", "RGBA", {}),
    ("AVIF", "RGB", {"quality": 60}),
    ("AVIF", "RGBA", {"save_all": True, "duration": 50}),
    ("JPEG2000", "RGB", {}),
)


def main() -> None:
    faulthandler.enable()
    kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    check = _CHECKS[kind]
    for number in range(first, last):
        print(json.dumps({"begin": number}), flush=True)
        started_s = time.monotonic()
        outcome = check(number)
        print(json.dumps({"end": number, "s": time.monotonic() - started_s, "outcome": outcome}), flush=True)


def check_image(number: int) -> str:
    """Decode a mutated image into a picture or a MediaError; any other exception ends the process."""
    seeds = load_originals()
    try:
        picture = decode_image(mutate(seeds[number % len(seeds)], number, seeds))
    except MediaError:
        return "error"
    assert picture.mode == "RGB" and min(picture.size) >= 1
    return "picture"


def check_tar(number: int) -> str:
    name, write = (("a.tar", "w"), ("a.tgz", "w:gz"), ("a.tar", "w:"), ("a.tar.gz", "w:gz"))[number % 4]
    form = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[number % 3]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=write, format=form) as tar:  # type: ignore[call-overload]
        for i in range(12):
            folder = "é" * 70 + "/" if i == 5 else ""  # a long name needs an extra header
            _add(tar, f"{folder}{i}.jpg", load_originals()[i % 5][:3000])
            _add(tar, f"{folder}{i}.json", json.dumps({"label": i}).encode())
    return _check_shard(name, mutate(file.getvalue(), number), {"keep_columns": ("label",)} if number % 5 else {})


def check_table(number: int) -> str:
    """Read a mutated Parquet, Arrow or JSON lines file."""
    suffix, write = (
        (".parquet", _write_parquet),
        (".jsonl", _write_jsonl),
        (".parquet", _write_parquet),
        (".arrow", _write_arrow),
    )[number % 4]
    keep = {"keep_columns": ("label",)} if number % 5 else {}
    return _check_shard(f"a{suffix}", mutate(write(number), number), keep)


def check_json(number: int) -> str:
    """Read mutated rows, conversations and arrays in JSON, some of them packed."""
    name, make = _JSON_FORMS[number % len(_JSON_FORMS)]
    data = make()
    if number % 3 == 0:
        return _check_shard(f"{name}.gz", mutate(gzip.compress(mutate(data, number)), number), {})
    return _check_shard(name, mutate(data, number), {"image_column": ""} if number % 7 == 0 else {})


def check_tree(number: int) -> str:
    """List a directory of odd names by its name and by a glob; each image is a row, which can be read."""
    with tempfile.TemporaryDirectory() as directory:
        expected = make_tree(Path(directory), number)
        for uri in (directory, f"{directory}/**"):
            config = CaptionConfig(input=(uri,), output="out", model="demo", limit=100)
            try:
                with list_rows(config, config.questionnaire) as listing:
                    rows = [row for table in listing.read_tables() for row in table.to_pylist()]
            except SourceError as error:
                assert not expected or uri != directory, error
                continue
            found = [
                row for row in rows if Path(row["uri"]).suffix.lower() in IMAGE_SUFFIXES
            ]  # a glob takes others too
            differing = {row["uri"] for row in found} ^ set(map(escape_name, expected))
            assert not differing and len(found) == len(expected), (uri, differing)
            assert all(map(_is_read, (row for row in found if not row["error"])))
    return f"{len(expected) // 10}0 rows"


def _check_shard(name: str, data: bytes, options: dict[str, object]) -> str:
    """List a shard into rows whose images are bytes or an OSError, or into a SourceError that names the shard."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(data)
        config = CaptionConfig(input=(str(path),), output="out", model="demo", **options)  # type: ignore[arg-type]
        try:
            with list_rows(config, config.questionnaire) as listing:
                rows = [row for table in listing.read_tables() for row in table.to_pylist()]
        except SourceError as error:
            assert str(path) in str(error) or "column" in str(error), error
            assert not find_faults([str(error)]), error
            return "refused"
        assert len({row["id"] for row in rows}) == len(rows) > 0
        assert not (faults := find_faults([row["error"] for row in rows if row["error"]])), faults
        return f"{len(rows)} rows, {sum(map(_is_read, rows))} read"


def _is_read(row: dict[str, list[dict[str, object]]]) -> bool:
    try:
        _get_fetcher().submit([parse_reference(image) for image in row["images"]]).result()  # type: ignore[arg-type]
    except OSError:
        return False
    return not row["error"]


@cache
def _get_fetcher() -> Fetcher:
    return Fetcher()


@cache
def load_originals() -> tuple[bytes, ...]:
    """Return small photographs as they are, and others resized and saved in every format."""
    files = [path.read_bytes() for path in find_photographs() if path.stat().st_size < 60_000]
    return (*(_encode_image(*saved) for saved in _SAVED), *files)


def _encode_image(format: str, mode: str, options: dict[str, object]) -> bytes:
    image = (
        Image.open(find_photographs()[_SAVED.index((format, mode, options)) % 3 + 8]).convert("RGB").resize((120, 90))
    )
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    elif mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    extra = {"append_images": [image.rotate(9 * i) for i in range(1, 4)]} if "save_all" in options else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, format, **options, **extra, **({"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}))
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _make_table() -> pa.Table:
    images = [{"bytes": data[:2000], "path": None} for data in load_originals()[:20]]
    return pa.table({"image": pa.array(images, _HF), "label": [f"l{i % 4}" for i in range(20)]})


def _write_parquet(number: int) -> bytes:
    rng = random.Random(number)
    file = io.BytesIO()
    compression = rng.choice(("none", "snappy", "zstd", "gzip", "lz4", "brotli"))
    options = {"use_dictionary": rng.random() < 0.5, "data_page_version": rng.choice(("1.0", "2.0"))}
    pq.write_table(_make_table(), file, row_group_size=rng.choice((4, 20)), compression=compression, **options)
    return file.getvalue()


def _write_arrow(number: int) -> bytes:
    file = io.BytesIO()
    make: Callable[..., pa.ipc.RecordBatchStreamWriter] = (pa.ipc.new_stream, pa.ipc.new_file)[number // 4 % 2]
    with make(file, _make_table().schema) as writer:
        writer.write_table(_make_table(), max_chunksize=7)
    return file.getvalue()


def _write_jsonl(number: int) -> bytes:
    return "\n".join(
        json.dumps({"image": f"{i}.jpg", "label": f"é{i}", "n": [i, {"a": i}]}) for i in range(20)
    ).encode()


def _make_json_lines() -> bytes:
    image = base64.b64encode(load_originals()[0][:300]).decode()
    rows: list[object] = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}]}]},
        {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["a.jpg"]},
        {"image": f"data:image/jpeg;base64,{image}", "prompt": "é"},
        {"img": {"bytes": image, "path": "a.jpg"}, "n": [1, {"a": None}]},
        {"url": ["https://example.org/a.jpg", "s3://bucket/b.png"], "id": 7},
    ]
    return "\n".join(map(json.dumps, rows * 4)).encode()


def _make_json_array() -> bytes:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": 'A [cat] {or} \\ " dog.'}]
    return json.dumps([{"id": i, "image": f"{i}.jpg", "conversations": turns} for i in range(20)], indent=1).encode()


_JSON_FORMS = (("a.jsonl", _make_json_lines), ("a.json", _make_json_array), ("a.json", _make_json_lines))
_CHECKS = {
    "images": check_image,
    "tars": check_tar,
    "tables": check_table,
    "json": check_json,
    "trees": check_tree,
}

if __name__ == "__main__":
    main()
