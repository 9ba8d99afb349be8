"""Measure what grows with the number of rows: listing, resume and memory.

    python -m benchmarks.scale listing [--files 100000] [--tars 1000]
    python -m benchmarks.scale resume [--rows 100000]
    python -m benchmarks.scale memory [--rows 3000]

`memory` runs that many rows of small pictures and ten times as many. Prints a table, and JSON as its last line.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from pipelines.config import CaptionConfig
from pipelines.output.manifest import write_manifest
from pipelines.pipeline import run_pipeline
from pipelines.sources import list_rows
from tests.support.fake_engine import FakeEngineFactory
from tests.support.processes import OpenCounter
from tests.support.roots import ROOT

Figures = dict[str, float]
_PICTURE_SIZE = (252, 252)  # nine cells and the overview: 211 KB of tiles
_RUN = "import sys; from benchmarks.scale import run; run(*sys.argv[1:])"


def run(source: str, output: str) -> None:
    """In a process of its own: a run with the demo model's processor and a fake engine."""
    engine = FakeEngineFactory(float(os.environ.get("OVIS_BENCH_SECONDS_PER_ROW", "0")))
    run_pipeline(CaptionConfig(input=(source,), output=output, model="demo"), make_engine=engine)


def listing(place: Path, num_files: int, num_tars: int) -> Figures:
    files, tars = place / "files", place / "tars"
    for i in range(num_files):
        path = files / f"{i // 1000:04}" / f"{i:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tars.mkdir()
    for i in range(num_tars):
        write_tar(tars / f"{i:05}.tar", 100)
    return {
        **_timed(f"{num_files} files", lambda: _list(str(files))),
        **_timed(f"{num_tars} tars of 100 members", lambda: _list(f"{tars}/*.tar")),
        "manifest: bytes a file": _manifest_bytes(str(files), place / "manifest of files"),
        "manifest: bytes a member": _manifest_bytes(f"{tars}/*.tar", place / "manifest of tars"),
    }


def _manifest_bytes(source: str, output: Path) -> float:
    """On disk, a row."""
    config = CaptionConfig(input=(source,), output="none", model="demo")
    with list_rows(config, config.questionnaire) as rows:
        write_manifest(str(output), rows.read_tables())
    return sum(path.stat().st_size for path in output.rglob("*.parquet")) / rows.num_rows


def write_tar(path: Path, num_members: int) -> None:
    picture = _picture(0)
    with tarfile.open(path, "w") as tar:
        for i in range(num_members):
            info = tarfile.TarInfo(f"{i:04}.png")
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))


def _list(source: str) -> None:
    config = CaptionConfig(input=(source,), output="none", model="demo")
    with list_rows(config, config.questionnaire):
        pass


def _timed(name: str, action: Callable[[], object]) -> Figures:
    cpu_s, wall_s = time.process_time(), time.monotonic()
    action()
    return {
        f"{name}: seconds": round(time.monotonic() - wall_s, 2),
        f"{name}: CPU seconds": round(time.process_time() - cpu_s, 2),
    }


def resume(place: Path, num_rows: int) -> Figures:
    """A finished run of rows of text is started again: nothing is to be done, and no input is opened."""
    source, output = place / "in" / "rows.jsonl", place / "out"
    source.parent.mkdir()
    source.write_text("".join(json.dumps({"prompt": f"What is {i} + 1?"}) + "\n" for i in range(num_rows)))
    started_s = time.monotonic()
    _subprocess("-c", _RUN, str(source), str(output))
    first_s = time.monotonic() - started_s
    with OpenCounter(source.parent) as counter:
        started_s = time.monotonic()
        last_line = _subprocess("-m", "jobs.caption", str(source), str(output), "--model", "demo").splitlines()[-1]
        again_s = time.monotonic() - started_s
    assert json.loads(last_line)["skipped_done"] == num_rows
    return {
        "first run: seconds": round(first_s, 1),
        "first run: rows/s": round(num_rows / first_s, 1),
        "again: seconds": round(again_s, 2),
        "again: inputs opened": counter.opens.total(),
        "output files": len(list((output / "data").iterdir())),
    }


def _subprocess(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout


def memory(place: Path, num_rows: int) -> Figures:
    figures: Figures = {}
    for times in (1, 10):
        source = place / f"{times}x"
        source.mkdir()
        for i in range(num_rows * times):
            (source / f"{i:07}.png").write_bytes(_picture(i))
        figures |= {f"{name}, {times}x": value for name, value in _peaks(source, place / f"out{times}").items()}
    return figures


def _picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", _PICTURE_SIZE, (seed % 256, seed // 256 % 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def _peaks(source: Path, output: Path) -> Figures:
    """MB of each kind of process, and of the object store, while a run of `source` goes on."""
    peaks: Figures = {}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OVIS_BENCH": str(output),
        "OVIS_BENCH_SECONDS_PER_ROW": "0.005",
    }
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(source), str(output)], env=environment)
    while process.poll() is None:
        for name, megabytes in _resident(process.pid, str(output)):
            peaks[name] = max(peaks.get(name, 0), megabytes)
        time.sleep(0.1)
    assert process.returncode == 0
    return peaks


def _resident(driver: int, mark: str) -> Iterator[tuple[str, float]]:
    """(kind of process, MB that it does not share), and the object store's MB, of a run's processes now."""
    for directory in Path("/proc").iterdir():
        try:
            if not directory.name.isdigit() or mark.encode() not in (directory / "environ").read_bytes():
                continue
            command = (directory / "cmdline").read_bytes().split(b"\0")[0].decode()
            status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
        except OSError:
            continue  # gone
        private_mb = int(status.get("RssAnon", "0 kB").split()[0]) / 1024
        if int(directory.name) == driver:
            yield "driver", private_mb
        elif command.endswith("raylet"):
            yield "object store", _plasma_mb(directory / "fd")
        for stage in ("Preprocess", "Generate"):
            if stage in command:
                yield stage, private_mb


def _plasma_mb(descriptors: Path) -> float:
    """What Ray's shared memory has taken so far: pages that were once written."""
    taken = {}
    for descriptor in descriptors.iterdir():
        with suppress(OSError):
            if "plasma" in os.readlink(descriptor):  # noqa: PTH115  (the file has no name any more)
                status = descriptor.stat()
                taken[status.st_ino] = status.st_blocks * 512 / 2**20
    return sum(taken.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["listing", "resume", "memory"])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--rows", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        match args.what:
            case "listing":
                figures = listing(place, args.files, args.tars)
            case "resume":
                figures = resume(place, args.rows or 100_000)
            case _:
                figures = memory(place, args.rows or 3000)
    for name, value in figures.items():
        print(f"{name:45} {value:>12,.2f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
