"""Feed mutated files to the real readers, in a process that may crash.

    python -m tests.stress.fuzz KIND FIRST LAST

KIND is images, tars or tables; each number from FIRST to LAST is the seed of a file. Prints a line of JSON before and
after each file, and exits with 1 at the first that gives neither rows nor an error that names the file.
"""

from __future__ import annotations

import faulthandler
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
from tests.stress.mutations import mutate
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
    check = {"images": check_image, "tars": check_tar, "tables": check_table}[kind]
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
            return "refused"
        assert len({row["id"] for row in rows}) == len(rows) > 0
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


if __name__ == "__main__":
    main()
