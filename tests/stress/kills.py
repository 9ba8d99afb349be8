"""Kill the replica again and again while a run works, then leave it in peace: every row must be `ok`.

    python -m tests.stress.kills [--every-s 4 5 8] [--storm-s 120] [--rows 60] [--ms-per-row 300] [--poison]

With `--poison`, one more row kills its process whenever it is tried; it alone must become an error row. The engine is
a fake one, everything else is real. Prints a line per storm and JSON as its last line; the exit code is 1 if a row is
lost or wrongly an error row.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.cli import run_job
from pipelines.config import CaptionConfig
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.fake_engine import FakeEngineFactory
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import draw, encode_picture
from tests.support.processes import Job, wait_for

_POISON_TILES = 10


@dataclass(frozen=True)
class Storm:
    """What one run went through. `seconds`: from the start of the replica to the end."""

    every_s: float
    kills: int
    exit_code: int
    rows: int
    blamed: tuple[str, ...]
    seconds: float
    rows_per_s: float


def run_storm(place: Path, every_s: float, storm_s: float, *, rows: int, ms_per_row: float, poison: bool) -> Storm:
    """Run captioning in `place` and kill its replica every `every_s` for `storm_s`, 0 for never."""
    pictures = place / "pictures"
    pictures.mkdir(parents=True)
    for number in range(rows):
        (pictures / f"{number:04}.png").write_bytes(encode_picture(number))
    if poison:
        draw(pictures / "poison.png", seed=0, width=600, height=500)
    job = Job(["tests.stress.kills", "--run", str(pictures), str(place / "out"), str(ms_per_row)]).start()
    wait_for(lambda: bool(job.find_actors("Generate")) or job.process.poll() is not None, 120)
    started_s = time.monotonic()
    kills = _kill_replicas(job, every_s, storm_s) if every_s else 0
    finished = job.finish(1200)
    seconds = time.monotonic() - started_s
    job.wait_until_all_gone()
    if finished.exit_code:
        print(finished.stderr, file=sys.stderr)
    written = read_results(str(place / "out")).to_pylist()
    blamed = tuple(sorted(Path(row["id"]).name for row in written if row["status"] == "error"))
    num = len({row["id"] for row in written})
    return Storm(every_s, kills, finished.exit_code, num, blamed, round(seconds, 1), round(num / seconds, 2))


def _kill_replicas(job: Job, every_s: float, storm_s: float) -> int:
    """Kill until the storm or the job ends; return the number of kills."""
    kills, begun_s = 0, time.monotonic()
    while time.monotonic() - begun_s < storm_s:
        next_s = time.monotonic() + every_s
        wait_for(lambda at_s=next_s: time.monotonic() > at_s or job.process.poll() is not None, every_s + 1)  # type: ignore[misc]
        if job.process.poll() is not None:
            break
        for pid in job.find_actors("Generate"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
    return kills


def _run(pictures: str, output: str, ms_per_row: str) -> int:
    config = CaptionConfig(input=(pictures,), output=output, model=str(checkpoint_dir("tiny56-tied")))
    engine = FakeEngineFactory(seconds_per_row=float(ms_per_row) / 1000, kills_on_tiles=_POISON_TILES)
    return run_job(lambda: run_pipeline(config, make_engine=engine))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every-s", type=float, nargs="+", default=[4.0, 5.0, 8.0], help="0: no kill")
    parser.add_argument("--storm-s", type=float, default=120.0)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--ms-per-row", type=float, default=300.0)
    parser.add_argument("--poison", action="store_true")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # the process that is disturbed
    args = parser.parse_args()
    if args.run:
        return _run(*args.run)
    options = {"rows": args.rows, "ms_per_row": args.ms_per_row, "poison": args.poison}
    with tempfile.TemporaryDirectory() as place:
        storms = [_report(run_storm(Path(place, str(every)), every, args.storm_s, **options)) for every in args.every_s]
    print(json.dumps([asdict(storm) for storm in storms]))
    wanted = (0, args.rows + args.poison, ("poison.png",) * args.poison)
    return int(any((storm.exit_code, storm.rows, storm.blamed) != wanted for storm in storms))


def _report(storm: Storm) -> Storm:
    print(storm, flush=True)
    return storm


if __name__ == "__main__":
    sys.exit(main())
