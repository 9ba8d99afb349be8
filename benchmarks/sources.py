"""Measure the cost of each kind of input, without a model: `python -m benchmarks.sources [--rows N] [--image-kb N]`.

The rates are per CPU second of this process and of those that read tables for it, so other load on the machine does not
count. Four things are measured: listing, listing again, with these processes started, reading every image in order, and
reading as four preprocessors do. In the last case each reads every fourth unit of 64 rows with its own cache.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.cpu_time import measure_cpu_s
from pipelines.config import CaptionConfig
from pipelines.media.fetch import Fetcher
from pipelines.media.reference import ImageRef, parse_reference
from pipelines.sources import list_rows
from tests.support.parquet_files import HF
from tests.support.tars import write_tar
from tests.support.web_server import WebServer

UNIT_ROWS, PREPROCESSORS = 64, 4

Images = list[list[ImageRef]]
MakeInput = Callable[[Path, list[bytes]], AbstractContextManager[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--image-kb", type=int, default=50)
    parser.add_argument("--kind", default="", help="only kinds whose name contains this")
    args = parser.parse_args()
    make_bytes = random.Random(0).randbytes
    payloads = [make_bytes(args.image_kb << 10) for _ in range(args.rows)]
    print(f"{args.rows} rows of {args.image_kb} KB; rows per CPU second\n")
    print("| kind | listing | again | reading in order | of 4 preprocessors, together |\n|---|---|---|---|---|")
    for name, make in KINDS.items():
        if args.kind not in name:
            continue
        with tempfile.TemporaryDirectory() as directory, make(Path(directory), payloads) as uri:
            _print_rates(name, uri, args.rows)


def _print_rates(name: str, uri: str, num_rows: int) -> None:
    config = CaptionConfig(input=(uri,), output="out", model="demo", allow_private_addresses=True)
    times_s = [measure_cpu_s()]
    for _ in range(2):
        with list_rows(config, config.questionnaire) as listing:
            rows = [row for table in listing.read_tables() for row in table.column("images").to_pylist()]
        times_s.append(measure_cpu_s())
    first_s, second_s = (end - start for start, end in pairwise(times_s))
    images = [[parse_reference(image) for image in row] for row in rows]
    assert len(images) == num_rows
    units = [images[at : at + UNIT_ROWS] for at in range(0, num_rows, UNIT_ROWS)]
    read_s = _measure_read_s(units)
    shared_s = sum(_measure_read_s(units[first::PREPROCESSORS]) for first in range(PREPROCESSORS))
    rates = (f"{num_rows / seconds:,.0f}" for seconds in (first_s, second_s, read_s, shared_s))
    print(f"| {name} | {' | '.join(rates)} |", flush=True)


def _measure_read_s(units: list[Images]) -> float:
    fetcher, started_s = Fetcher(), measure_cpu_s()
    for unit in units:
        for begin in range(0, len(unit), 16):
            for pending in [fetcher.submit(images) for images in unit[begin : begin + 16]]:
                pending.result()
    return measure_cpu_s() - started_s


@contextmanager
def _make_files(directory: Path, payloads: list[bytes]) -> Iterator[str]:
    for i, data in enumerate(payloads):
        (directory / f"{i:06}.jpg").write_bytes(data)
    yield str(directory)


def _make_tar(mode: str) -> MakeInput:
    @contextmanager
    def make(directory: Path, payloads: list[bytes]) -> Iterator[str]:
        members = [(f"{i:06}.jpg", data) for i, data in enumerate(payloads)]
        yield str(write_tar(directory / ("a.tar" if mode == "w" else "a.tgz"), members, mode))

    return make


def _make_parquet(rows_per_group: int) -> MakeInput:
    @contextmanager
    def make(directory: Path, payloads: list[bytes]) -> Iterator[str]:
        images = pa.array([{"bytes": data, "path": None} for data in payloads], HF)
        path = directory / "a.parquet"
        pq.write_table(pa.table({"image": images}), path, row_group_size=rows_per_group)
        yield str(path)

    return make


@contextmanager
def _make_arrow(directory: Path, payloads: list[bytes]) -> Iterator[str]:
    table = pa.table({"image": pa.array([{"bytes": data, "path": None} for data in payloads], HF)})
    with pa.ipc.new_stream(directory / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    yield str(directory / "a.arrow")


@contextmanager
def _make_jsonl(directory: Path, payloads: list[bytes]) -> Iterator[str]:
    with _make_files(directory, payloads):
        lines = "\n".join(json.dumps({"image": f"{i:06}.jpg"}) for i in range(len(payloads)))
        (directory / "a.jsonl").write_text(lines)
        yield str(directory / "a.jsonl")


@contextmanager
def _serve_files(directory: Path, payloads: list[bytes]) -> Iterator[str]:
    """Serve the files over HTTP; the server's threads run in this process, so their CPU time is included."""
    with WebServer().run() as server:
        server.files = {f"/{i}.jpg": data for i, data in enumerate(payloads)}
        lines = "\n".join(json.dumps({"image": f"{server.url}/{i}.jpg"}) for i in range(len(payloads)))
        (directory / "a.jsonl").write_text(lines)
        yield str(directory / "a.jsonl")


KINDS: dict[str, MakeInput] = {
    "image files": _make_files,
    "JSON lines of files": _make_jsonl,
    "tar": _make_tar("w"),
    "tar.gz": _make_tar("w:gz"),
    "Parquet, row groups of 100": _make_parquet(100),
    "Parquet, one row group": _make_parquet(1_000_000),
    "saved dataset (Arrow)": _make_arrow,
    "JSON lines of URLs (loopback, with the server)": _serve_files,
}

if __name__ == "__main__":
    main()
