"""Measure what a captioning job costs around its rows: wall time, and CPU seconds of each of its processes.

    python -m benchmarks.startup [--rows 16] [--rounds 3] [--against CHECKOUT]
    python -m benchmarks.startup --imports [--against CHECKOUT]

Captions drawn images with the demo model, as a shell runs the job. `--against` names another checkout of the project,
whose runs alternate with those of this one. "exit" is the time from the last written file to the end of the process.
/proc is read every 50 ms, so that much of each process may be missing. Prints a table of medians, then JSON.

With `--imports`: what the processes of a job import, as `python -X importtime` lists it, and the CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jobs.demo import draw_pictures
from tests.support.roots import ROOT

Figures = dict[str, float]
_MARK = "OVIS_STARTUP_RUN"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_KINDS = ("gcs_server", "raylet", "dashboard", "runtime_env/agent", "log_monitor", "autoscaler/_private/monitor")


_IMPORT = re.compile(r"^import time: +\d+ \| +\d+ \| +(\S+)$", re.MULTILINE)
_PACKAGES = 6  # shown per process, the largest
_LOAD = (
    "pipelines.generate.load_engine(pipelines.generate.Replica(resolve_local_path('demo'), None, 'float32', 'cpu', 1))"
)
_PROGRAMS = {
    "driver": "import jobs.caption, pipelines.pipeline, ray.data",
    "Preprocess": "import ray.data, pipelines.preprocess",
    "Generate": f"import ray.data, pipelines.generate; from ovis_model.checkpoint import resolve_local_path; {_LOAD}",
}


class ProcessWatch:
    """The processes whose environment holds `mark`, with their names and CPU seconds when they were last seen."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._own: dict[int, bool] = {}
        self._seen: dict[int, tuple[str, float]] = {}

    def look(self) -> None:
        """Read /proc once."""
        for pid in self._list_own():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if command:
                self._seen[pid] = name_process(command), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def add_up(self) -> Figures:
        """Return the CPU seconds by kind of process, the largest first."""
        sums: Counter[str] = Counter()
        for name, cpu_s in self._seen.values():
            sums[name] += cpu_s  # type: ignore[assignment]
        return dict(sums.most_common())

    def _list_own(self) -> Iterator[int]:
        for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208  (Path objects cost three times as much)
            pid = int(name)
            if pid not in self._own:
                try:
                    self._own[pid] = self._mark in Path(f"/proc/{pid}/environ").read_bytes()
                except OSError:
                    continue
            if self._own[pid]:
                yield pid


def name_process(command: str) -> str:
    """Return the kind of a process of a job: the actor's class, Ray's part, or the driver."""
    if actor := re.match(r"ray::.*?(\w+)\)*(\.\w+)?\s*$", command):
        return actor[1]
    if "-m jobs.caption" in command:
        return "driver"
    program = command.partition(" --")[0]
    return next((kind for kind in _KINDS if kind in program), "other")


def measure_run(checkout: Path, pictures: Path, output: Path) -> Figures:
    """Run the job once from a checkout -> its wall seconds, CPU seconds and rate."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "PYTHONPATH": str(checkout), _MARK: mark}
    command = [sys.executable, "-m", "jobs.caption", str(pictures), str(output), "--model", "demo", "--overwrite"]
    watch, started_s = ProcessWatch(mark), time.time()
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        watch.look()
        time.sleep(0.05)
    ended_s = time.time()
    out, err = process.communicate()
    assert process.returncode == 0, err
    written_s = max(path.stat().st_mtime for path in (output / "data").iterdir())
    by_process, rows = watch.add_up(), json.loads(out.splitlines()[-1])["rows"]
    return {
        "wall s": ended_s - started_s,
        "exit s": ended_s - written_s,
        "rows/s": rows / (ended_s - started_s),
        "CPU s": sum(by_process.values()),
        **{f"CPU s: {name}": cpu_s for name, cpu_s in by_process.items()},
    }


def measure_rounds(checkouts: list[Path], place: Path, rows: int, rounds: int) -> list[Figures]:
    """Return the medians of each checkout; their runs alternate."""
    pictures = place / "pictures"
    draw_pictures(pictures, rows, seed=1)
    runs: list[list[Figures]] = [[] for _ in checkouts]
    for _ in range(rounds):
        for checkout, figures in zip(checkouts, runs, strict=True):
            figures.append(measure_run(checkout, pictures, place / "captions"))
    return [_take_medians(figures) for figures in runs]


def measure_imports(checkout: Path, rounds: int) -> Figures:
    """Return what each process of a job imports: the modules, by package, and the least CPU seconds that it takes."""
    figures: Figures = {}
    for process, program in _PROGRAMS.items():
        least_s, modules = min(_import_once(checkout, program) for _ in range(rounds))
        by_package = Counter(name.partition(".")[0] for name in modules)
        figures |= {f"{process}: CPU s": least_s, f"{process}: modules": len(modules)}
        figures |= {f"{process}: {name}": count for name, count in by_package.most_common(_PACKAGES)}
    return figures


def _import_once(checkout: Path, program: str) -> tuple[float, list[str]]:
    """Return the CPU seconds of a program, and the modules that it imports."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-X", "importtime", "-c", program]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(sum(after[:2]) - sum(before[:2]), 3), _IMPORT.findall(done.stderr)


def _take_medians(figures: list[Figures]) -> Figures:
    names = dict.fromkeys(name for run in figures for name in run)
    return {name: round(statistics.median(run.get(name, 0.0) for run in figures), 2) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, nargs="*", default=[])
    parser.add_argument("--imports", action="store_true")
    args = parser.parse_args()
    checkouts = [*(path.absolute() for path in args.against), ROOT]
    if args.imports:
        print_figures(checkouts, [measure_imports(checkout, args.rounds) for checkout in checkouts])
        return
    with tempfile.TemporaryDirectory() as directory:
        figures = measure_rounds(checkouts, Path(directory), args.rows, args.rounds)
    print_figures(checkouts, figures)


def print_figures(checkouts: list[Path], figures: list[Figures]) -> None:
    """Print a table with a column per checkout, then JSON."""
    print(f"{'':28}" + "".join(f"{path.name:>14}" for path in checkouts))
    for name in dict.fromkeys(name for each in figures for name in each):
        print(f"{name:28}" + "".join(f"{each.get(name, 0.0):14.2f}" for each in figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
