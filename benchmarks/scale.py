"""Measure what grows with the number of rows: listing, resume and memory.

    python -m benchmarks.scale listing [--files 100000] [--tars 1000]
    python -m benchmarks.scale tables [--rows 1000000]
    python -m benchmarks.scale resume [--rows 100000]
    python -m benchmarks.scale finished [--rows 1000000]
    python -m benchmarks.scale memory [--rows 3000]
    python -m benchmarks.scale prepare [--rows 2000]

`memory` measures two runs over small images: with that many rows, and with ten times as many. Prints a table, then JSON
as its last line.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ovis_model.inputs.processor import Processor
from pipelines.checks import describe_models, resolve_model_paths
from pipelines.cluster.attempts import AttemptCounts
from pipelines.config import CaptionConfig
from pipelines.media.images import decode_image
from pipelines.output.manifest import encode_manifest, write_manifest
from pipelines.output.run_record import open_run
from pipelines.output.sink import write_file
from pipelines.pipeline import run_pipeline
from pipelines.preprocess import Preprocess, RequestBuilder
from pipelines.sources import list_rows
from pipelines.storage.table_reader import get_processes
from tests.support.fake_engine import FakeEngineFactory
from tests.support.outputs import make_results
from tests.support.parquet_files import HF
from tests.support.processes import OpenCounter
from tests.support.roots import ROOT

Figures = dict[str, float]
_IMAGE_SIZE = (252, 252)  # nine tiles and the overview: 211 KB
_LIST = "import sys; from benchmarks.scale import list_table as run; run(*sys.argv[1:])"
_RUN = "import sys; from benchmarks.scale import caption_with_fake_engine as run; run(*sys.argv[1:])"


def caption_with_fake_engine(source: str, output: str) -> None:
    """Run a captioning job with the demo model's processor and a fake engine; called in a separate process."""
    engine = FakeEngineFactory(float(os.environ.get("OVIS_BENCH_SECONDS_PER_ROW", "0")))
    run_pipeline(CaptionConfig(input=(source,), output=output, model="demo"), make_engine=engine)


def measure_listing(place: Path, num_files: int, num_tars: int) -> Figures:
    files, tars = place / "files", place / "tars"
    for i in range(num_files):
        path = files / f"{i // 1000:04}" / f"{i:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tars.mkdir()
    for i in range(num_tars):
        _write_tar(tars / f"{i:05}.tar", 100)
    return {
        **_time_action(f"{num_files} files", lambda: _list_rows(str(files))),
        **_time_action(f"{num_tars} tars of 100 members", lambda: _list_rows(f"{tars}/*.tar")),
        "manifest: bytes per file": _measure_manifest_bytes(str(files), place / "manifest of files"),
        "manifest: bytes per member": _measure_manifest_bytes(f"{tars}/*.tar", place / "manifest of tars"),
    }


def measure_tables(place: Path, num_rows: int) -> Figures:
    """List Parquet files with images, Parquet files with URLs, and JSON lines; each with ids and prompts.

    Also files whose rows have further fields, one of which is kept and another one named in the prompt.
    """
    texts = {name: [f"{name} {i}" for i in range(num_rows)] for name in ("id", "prompt")}
    urls = [f"https://images.example.com/{i // 1000:04}/{i:09}.jpg" for i in range(num_rows)]
    images = pa.array([{"bytes": b"", "path": None}] * num_rows, HF)
    pq.write_table(pa.table({**texts, "image": images}), place / "images.parquet", row_group_size=10_000)
    pq.write_table(pa.table({**texts, "url": urls}), place / "urls.parquet", row_group_size=10_000)
    with (place / "lines.jsonl").open("w") as file:
        for id_, prompt, url in zip(texts["id"], texts["prompt"], urls, strict=True):
            file.write(json.dumps({"id": id_, "prompt": prompt, "url": url}) + "\n")
    scores = [None if i % 5 == 0 else i / 7 for i in range(num_rows)]
    pq.write_table(pa.table({**texts, "url": urls, "score": scores}), place / "fields.parquet", row_group_size=10_000)
    with (place / "fields.jsonl").open("w") as file:
        for id_, title, url, score in zip(texts["id"], texts["prompt"], urls, scores, strict=True):
            fields = {"id": id_, "title": title, "url": url, "score": score, "meta": {"tags": ["a"], "width": None}}
            file.write(json.dumps(fields) + "\n")
    figures: Figures = {}
    for name in ("images.parquet", "urls.parquet", "lines.jsonl", "fields.parquet", "fields.jsonl"):
        figures |= json.loads(_run_python("-c", _LIST, str(place / name), name).splitlines()[-1])
    return figures


def list_table(source: str, name: str) -> None:
    """Print the figures of listing a file and encoding its manifest; called in a separate process."""
    options: dict[str, Any] = {} if source.endswith(".jsonl") else {"id_column": "id"}
    if name.startswith("fields"):
        title = "title" if source.endswith(".jsonl") else "prompt"
        options |= {"keep_columns": ("score",), "prompt": f"Describe {{{title}}}."}
    else:
        options |= {"prompt_column": "prompt"}
    config = CaptionConfig(input=(source,), output="none", model="demo", **options)
    started_s, before_mb = time.process_time(), _read_peak_mb()
    with list_rows(config, config.questionnaire) as rows:
        listed_s = time.process_time()
        for _ in encode_manifest("none", rows.read_tables()):
            pass
    ended_s, peak_mb = time.process_time(), _read_peak_mb()
    get_processes().close()
    reader_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    figures = {
        "listing, us a row": 1e6 * (listed_s - started_s) / rows.num_rows,
        "the reader's process, us a row": 1e6 * reader_s / rows.num_rows,
        "manifest, us a row": 1e6 * (ended_s - listed_s) / rows.num_rows,
        "peak MB above the start": peak_mb - before_mb,
    }
    print(json.dumps({f"{name}: {key}": round(value, 2) for key, value in figures.items()}))


def _read_peak_mb() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def _measure_manifest_bytes(source: str, output: Path) -> float:
    """Return the bytes that the manifest takes on disk per row."""
    config = CaptionConfig(input=(source,), output="none", model="demo")
    with list_rows(config, config.questionnaire) as rows:
        write_manifest(str(output), rows.read_tables())
    return sum(path.stat().st_size for path in output.rglob("*.parquet")) / rows.num_rows


def _write_tar(path: Path, num_members: int) -> None:
    image = _encode_image(0)
    with tarfile.open(path, "w") as tar:
        for i in range(num_members):
            info = tarfile.TarInfo(f"{i:04}.png")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))


def _list_rows(source: str) -> None:
    config = CaptionConfig(input=(source,), output="none", model="demo")
    with list_rows(config, config.questionnaire):
        pass


def _time_action(name: str, action: Callable[[], object]) -> Figures:
    cpu_s, wall_s = time.process_time(), time.monotonic()
    action()
    return {
        f"{name}: seconds": round(time.monotonic() - wall_s, 2),
        f"{name}: CPU seconds": round(time.process_time() - cpu_s, 2),
    }


def measure_resume(place: Path, num_rows: int) -> Figures:
    """Run rows of text to the end, then the same command again, which should open no input."""
    source, output = place / "in" / "rows.jsonl", place / "out"
    source.parent.mkdir()
    source.write_text("".join(json.dumps({"prompt": f"What is {i} + 1?"}) + "\n" for i in range(num_rows)))
    started_s = time.monotonic()
    _run_python("-c", _RUN, str(source), str(output))
    first_s = time.monotonic() - started_s
    with OpenCounter(source.parent) as counter:
        started_s = time.monotonic()
        last_line = _run_python("-m", "jobs.caption", str(source), str(output), "--model", "demo").splitlines()[-1]
        again_s = time.monotonic() - started_s
    assert json.loads(last_line)["skipped_done"] == num_rows
    return {
        "first run: seconds": round(first_s, 1),
        "first run: rows/s": round(num_rows / first_s, 1),
        "again: seconds": round(again_s, 2),
        "again: inputs opened": counter.opens.total(),
        "output files": len(list((output / "data").iterdir())),
    }


def measure_finished(place: Path, num_rows: int) -> Figures:
    """Write the manifest and the files of a finished run, then start its command, which should open no input."""
    source, output = place / "in" / "rows.jsonl", place / "out"
    source.parent.mkdir()
    with source.open("w") as file:
        file.writelines(json.dumps({"prompt": f"What is {i} + 1?"}) + "\n" for i in range(num_rows))
    config = CaptionConfig(input=(str(source),), output=str(output), model="demo")
    config = resolve_model_paths(config)
    run = open_run(config, describe_models(config))
    for start in range(0, num_rows, 5000):
        write_file(run.data_uri, make_results(range(start, min(start + 5000, num_rows))))
    run.update(status="finished")
    started_s, cpu_s = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with OpenCounter(source.parent) as counter:
        last_line = _run_python("-m", "jobs.caption", str(source), str(output), "--model", "demo").splitlines()[-1]
    assert json.loads(last_line)["skipped_done"] == num_rows
    return {
        "again: seconds": round(time.monotonic() - started_s, 2),
        "again: CPU seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu_s, 2),
        "again: inputs opened": counter.opens.total(),
        "output files": len(list((output / "data").iterdir())),
    }


def measure_prepare(place: Path, num_rows: int) -> Figures:
    """Prepare rows of small pictures in this process; of three rounds the one with the least CPU time counts."""
    source = place / "in"
    source.mkdir()
    for i in range(num_rows):
        Image.new("RGB", (64, 48), (i % 256, 90, 90)).save(source / f"{i:07}.png")
    config = resolve_model_paths(CaptionConfig(input=(str(source),), output=str(place / "out"), model="demo"))
    run, questionnaire = open_run(config, describe_models(config)), config.questionnaire
    stage = Preprocess(run.output, config.model, None, config, questionnaire, AttemptCounts())
    units = [{"start": np.array([at]), "stop": np.array([min(at + 64, num_rows)])} for at in range(0, num_rows, 64)]
    requests = RequestBuilder(Processor.from_pretrained(config.model, None), config, questionnaire)
    pictures, prompt = [path.read_bytes() for path in sorted(source.iterdir())], questionnaire.tasks[0].prompt
    whole_s = min(_measure_cpu_s(lambda: [list(stage(unit)) for unit in units]) for _ in range(3))
    alone_s = min(
        _measure_cpu_s(lambda: [requests.build_image_requests(prompt, [decode_image(data)]) for data in pictures])
        for _ in range(3)
    )
    return {
        "prepare: CPU ms a row": 1e3 * whole_s / num_rows,
        "decode, tile, ids alone: CPU ms a row": 1e3 * alone_s / num_rows,
        "the rest: CPU ms a row": 1e3 * (whole_s - alone_s) / num_rows,
    }


def _measure_cpu_s(action: Callable[[], object]) -> float:
    started_s = time.process_time()
    action()
    return time.process_time() - started_s


def _run_python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout


def measure_memory(place: Path, num_rows: int) -> Figures:
    figures: Figures = {}
    for times in (1, 10):
        source = place / f"{times}x"
        source.mkdir()
        for i in range(num_rows * times):
            (source / f"{i:07}.png").write_bytes(_encode_image(i))
        figures |= {f"{name}, {times}x": value for name, value in _measure_peaks(source, place / f"out{times}").items()}
    return figures


def _encode_image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", _IMAGE_SIZE, (seed % 256, seed // 256 % 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def _measure_peaks(source: Path, output: Path) -> Figures:
    """Return the peak MB of each kind of process, and of the object store, during a run over `source`."""
    peaks: Figures = {}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OVIS_BENCH": str(output),
        "OVIS_BENCH_SECONDS_PER_ROW": "0.005",
    }
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(source), str(output)], env=environment)
    while process.poll() is None:
        for name, megabytes in _read_private_mb(process.pid, str(output)):
            peaks[name] = max(peaks.get(name, 0), megabytes)
        time.sleep(0.1)
    assert process.returncode == 0
    return peaks


def _read_private_mb(driver: int, mark: str) -> Iterator[tuple[str, float]]:
    """Yield (kind of process, its private MB) for each process of the run now, and the MB of the object store."""
    for directory in Path("/proc").iterdir():
        try:
            if not directory.name.isdigit() or mark.encode() not in (directory / "environ").read_bytes():
                continue
            command = (directory / "cmdline").read_bytes().split(b"\0")[0].decode()
            status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
        except OSError:
            continue  # the process has ended
        private_mb = int(status.get("RssAnon", "0 kB").split()[0]) / 1024
        if int(directory.name) == driver:
            yield "driver", private_mb
        elif command.endswith("raylet"):
            yield "object store", _read_plasma_mb(directory / "fd")
        for stage in ("Preprocess", "Generate"):
            if stage in command:
                yield stage, private_mb


def _read_plasma_mb(descriptors: Path) -> float:
    """Return the MB that Ray's shared memory has taken so far, i.e. the pages ever written."""
    taken_mb = {}
    for descriptor in descriptors.iterdir():
        with suppress(OSError):
            if "plasma" in os.readlink(descriptor):  # noqa: PTH115  (the file is already unlinked)
                status = descriptor.stat()
                taken_mb[status.st_ino] = status.st_blocks * 512 / 2**20
    return sum(taken_mb.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["listing", "tables", "resume", "finished", "memory", "prepare"])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--rows", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        match args.what:
            case "listing":
                figures = measure_listing(place, args.files, args.tars)
            case "tables":
                figures = measure_tables(place, args.rows or 1_000_000)
            case "finished":
                figures = measure_finished(place, args.rows or 1_000_000)
            case "prepare":
                figures = measure_prepare(place, args.rows or 2000)
            case "resume":
                figures = measure_resume(place, args.rows or 100_000)
            case _:
                figures = measure_memory(place, args.rows or 3000)
    for name, value in figures.items():
        print(f"{name:45} {value:>12,.2f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
