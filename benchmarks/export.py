"""Export rows with their images in each format: time, memory, counts; each export is killed once and resumed.

    python -m benchmarks.export DIRECTORY [--rows 10000] [--formats webdataset hf]

Writes a run of `--rows` rows with an image each to DIRECTORY, unless it is there. For each format, `ovis2 export` is
killed with SIGKILL once a third of its parts is written, and started again. CPU seconds are those of both processes,
memory is the larger peak. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.drawings import make_picture
from pipelines.export.formats import FORMATS
from pipelines.media.reference import FileRef
from tests.support.annotations import make_answers, make_item, write_run

NUM_PICTURES = 100  # different ones
ROWS_PER_FILE = 500
COLUMNS = ("format", "written", "error", "skipped_done", "files", "wall_s", "cpu_s", "peak_mb", "size_mb")
Figures = dict[str, Any]


def main() -> None:
    args = _parse()
    if not (args.directory / "run").exists():
        write_rows(args.directory, args.rows)
    found = [measure_export(args.directory, name, args.rows) for name in args.formats]
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    print("\n".join(f"| {' | '.join(str(figures[name]) for name in COLUMNS)} |" for figures in found))
    print(json.dumps(found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--formats", nargs="+", default=sorted(FORMATS), choices=sorted(FORMATS))
    return parser.parse_args()


def write_rows(directory: Path, num_rows: int) -> None:
    """Write a finished run of six tasks and a JPEG file per row."""
    pictures = directory / "pictures"
    pictures.mkdir(parents=True)
    for number in range(min(NUM_PICTURES, num_rows)):
        make_picture(number, held_out=False)[0].save(pictures / f"{number}.jpg")
    items = []
    for number in range(num_rows):
        file = pictures / f"{number}.jpg"
        if number >= NUM_PICTURES:
            shutil.copyfile(pictures / f"{number % NUM_PICTURES}.jpg", file)
        refs = [FileRef(str(file), num_bytes=file.stat().st_size)]
        items.append(make_item(f"id {number}", make_answers(count=number % 20), images=refs))
    write_run(directory / "run", items)


def measure_export(directory: Path, name: str, num_rows: int) -> Figures:
    """Export in a format, killed once. Raise RuntimeError if it could not be killed, or if rows are missing."""
    target = directory / name
    shutil.rmtree(target, ignore_errors=True)
    command = ["-m", "jobs", "export", str(directory / "run"), str(target), "--format", name]
    started_s = time.monotonic()
    killed = _run([*command, f"--rows-per-file={ROWS_PER_FILE}"], target, num_rows // ROWS_PER_FILE // 3)
    resumed = _run([*command, f"--rows-per-file={ROWS_PER_FILE}"], target)
    if killed["exit_code"] != -signal.SIGKILL or resumed["exit_code"] or resumed["written"] != num_rows:
        raise RuntimeError(f"{name}: {killed}, {resumed}")
    return {
        **resumed,
        "format": name,
        "wall_s": round(time.monotonic() - started_s, 1),
        "cpu_s": round(killed["cpu_s"] + resumed["cpu_s"], 1),
        "peak_mb": max(killed["peak_mb"], resumed["peak_mb"]),
        "size_mb": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) >> 20,
    }


def _run(command: Sequence[str], target: Path, kill_after: int | None = None) -> Figures:
    """Run the command; kill it when `kill_after` parts are written. Return its counts, CPU seconds and peak memory."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as process:
        while kill_after is not None and len(list((target / "_parts").glob("*.jsonl"))) < kill_after:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise RuntimeError("the export ended before it could be killed")
            time.sleep(0.01)
        if kill_after is not None:
            process.kill()
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    counts = json.loads(output.splitlines()[-1]) if output.strip() else {}
    used = {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss >> 10}
    return {**counts, **used, "exit_code": process.returncode}


if __name__ == "__main__":
    main()
