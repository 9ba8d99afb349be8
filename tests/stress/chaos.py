"""Disturb runs once at a random moment and repeat them until they finish: each must equal an undisturbed run.

    python -m tests.stress.chaos [--runs 50] [--rows 300] [--seed 0] [--only EVENT]

Prints a line per run, a table of the events, and JSON as its last line; the exit code is 1 if a run differs. A run with
the demo model takes about a minute on two cores. The event `disk` needs the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipelines.output.sink import read_results
from tests.support.faulty_store import Faults, FaultyStore
from tests.support.pictures import write_demo_pictures
from tests.support.processes import Job, OpenCounter, list_files, wait_for

MAX_ATTEMPTS = 5
_OPTIONS = ["--model", "demo", "--max-new-tokens", "24", "--rows-per-file", "16"]


@dataclass(frozen=True)
class Moment:
    """The moment when `num_files` are written, plus `extra_s`: a fixed time would miss the work on a busy machine."""

    num_files: int
    extra_s: float

    def wait(self, job: Job, output: Path) -> bool:
        """Wait for the moment; return whether the job is still running."""
        wait_for(lambda: job.process.poll() is not None or len(list_files(output)) >= self.num_files, 600)
        time.sleep(self.extra_s)
        return job.process.poll() is None


Disturb = Callable[[Job, Path, Moment], bool]
"""A function that disturbs a job writing to a directory at a moment and returns whether the job was still running."""


@dataclass(frozen=True)
class Outcome:
    """Result of one run: whether its rows equal the undisturbed run's, the attempts, and what was read again."""

    event: str
    is_hit: bool
    is_equal: bool
    attempts: int
    seconds: float
    rows_read_again: int
    bytes_read_again: int
    written_rows_read_again: int


class Chaos:
    def __init__(self, place: Path, num_rows: int) -> None:
        self._place, self.num_rows = place, num_rows
        self.pictures = place / "pictures"
        self.pictures.mkdir()
        write_demo_pictures(self.pictures, num_rows)
        finished = self._make_job(self.pictures, place / "undisturbed").start().finish(600)
        assert finished.exit_code == 0, finished.stderr
        self._rows = read_rows(place / "undisturbed")

    def run(self, event: str, seed: int) -> Outcome:
        """Run once, disturbed at a random moment between the start and the last rows."""
        rng = random.Random(seed)
        num_files = rng.randrange(len(list_files(self._place / "undisturbed")))
        moment = Moment(num_files, rng.uniform(0, 1 if num_files else 15))
        output = self._place / f"{event}-{seed}"
        if event == "store":
            return self._run_on_failing_store(output, seed)
        disturb, disk = EVENTS[event], _mount_small_disk(output) if event == "disk" else nullcontext()
        with disk:
            return self._run_disturbed(event, disturb, output, moment)

    def is_equal(self, output: Path) -> bool:
        return read_rows(output) == self._rows

    def _run_disturbed(self, event: str, disturb: Disturb, output: Path, moment: Moment) -> Outcome:
        started_s, opens, again, is_hit = time.monotonic(), Counter[str](), 0, False
        for attempt in range(1, MAX_ATTEMPTS + 1):
            written = read_names(output)
            with OpenCounter(self.pictures) as counter:
                job = self._make_job(self.pictures, output).start()
                if attempt == 1:
                    is_hit = disturb(job, output, moment)
                exit_code = _finish(job)
            opens += counter.opens
            again += sum(counter.opens[name] for name in written)
            if exit_code == 0:
                break
        twice = {name: times - 1 for name, times in opens.items() if times > 1}
        num_bytes = sum((self.pictures / name).stat().st_size * times for name, times in twice.items())
        is_equal = exit_code == 0 and self.is_equal(output)
        seconds = time.monotonic() - started_s
        return Outcome(event, is_hit, is_equal, attempt, seconds, sum(twice.values()), num_bytes, again)

    def _run_on_failing_store(self, output: Path, seed: int) -> Outcome:
        """Run on a store that answers one request in twenty with an error, half a body, or 10 s late."""
        server, started_s = FaultyStore(), time.monotonic()
        try:
            environment = server.to_environment()
            fs = _open_store(server)
            bucket = f"run-{seed}"  # all servers of a process share their buckets
            fs.mkdir(bucket)
            fs.put(str(self.pictures), f"{bucket}/pictures", recursive=True)
            with server.inject(Faults(0.05, ("error", "cut", "stall"), seed=seed)) as faults:
                commands = (
                    _finish(self._make_job(f"s3://{bucket}/pictures", f"s3://{bucket}/out", environment).start())
                    for _ in range(MAX_ATTEMPTS)
                )
                attempts = 1 + sum(1 for _ in takewhile(bool, commands))
            fs.get(f"{bucket}/out", str(output), recursive=True)
            sizes = {f"/{bucket}/pictures/{path.name}": path.stat().st_size for path in self.pictures.iterdir()}
            twice = {path: faults.reads[path] - 1 for path in sizes if faults.reads[path] > 1}
            num_bytes = sum(sizes[path] * times for path, times in twice.items())
            is_equal = self.is_equal(output)
            seconds = time.monotonic() - started_s
            return Outcome(
                "store", faults.num_faults > 0, is_equal, attempts, seconds, sum(twice.values()), num_bytes, 0
            )
        finally:
            server.close()

    def _make_job(self, source: object, output: object, environment: dict[str, str] | None = None) -> Job:
        return Job(["jobs.caption", str(source), str(output), *_OPTIONS], environment=environment or {})


def kill_driver(job: Job, output: Path, moment: Moment) -> bool:
    is_hit = moment.wait(job, output)
    job.kill()
    return is_hit


def kill_preprocessor(job: Job, output: Path, moment: Moment) -> bool:
    """Kill a preprocessor soon after it starts: all pictures are prepared long before the first file is written."""
    return _kill_actor(job, "Preprocess", moment.extra_s % 1)


def kill_replica(job: Job, output: Path, moment: Moment) -> bool:
    moment.wait(job, output)
    return _kill_actor(job, "Generate", 0)


def kill_writing(job: Job, output: Path, moment: Moment) -> bool:
    """Kill the driver while a file has its temporary name and more files are to come."""
    Moment(moment.num_files // 2, 0).wait(job, output)
    wait_for(lambda: job.process.poll() is not None or any((output / "data").glob(".*.tmp")), 20)
    is_hit = job.process.poll() is None
    job.kill()
    return is_hit


def stop(job: Job, output: Path, moment: Moment) -> bool:
    """Stop the driver as `ray job stop` does: SIGTERM and, three seconds later, SIGKILL."""
    is_hit = moment.wait(job, output)
    job.process.send_signal(signal.SIGTERM)
    wait_for(lambda: job.process.poll() is not None, 3)
    job.kill()
    return is_hit


def fill_disk(job: Job, output: Path, moment: Moment) -> bool:
    """Fill the disk before the next file is written, and free it before the next attempt."""
    is_hit = moment.wait(job, output)
    filler = output / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    _finish(job)
    filler.unlink()
    return is_hit


EVENTS: dict[str, Disturb] = {
    "driver": kill_driver,
    "preprocessor": kill_preprocessor,
    "replica": kill_replica,
    "writing": kill_writing,
    "stop": stop,
    "disk": fill_disk,
}
ALL_EVENTS = (*EVENTS, "store")


def _kill_actor(job: Job, stage: str, after_s: float) -> bool:
    """Kill an actor of the stage `after_s` after it starts; return False if the run ends before."""
    wait_for(lambda: job.process.poll() is not None or bool(job.find_actors(stage)), 60)
    time.sleep(after_s)
    for pid in job.find_actors(stage)[:1]:
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def _finish(job: Job) -> int:
    exit_code = job.process.returncode if job.process.poll() is not None else job.finish(600).exit_code
    job.wait_until_all_gone()
    return exit_code


@contextmanager
def _mount_small_disk(place: Path) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def _open_store(server: FaultyStore) -> Any:
    from s3fs import S3FileSystem

    return S3FileSystem(key="key", secret="secret", endpoint_url=server.endpoint, skip_instance_cache=True)


def read_rows(output: Path) -> list[tuple[str, str, str]]:
    """Return name, text and status of each row, in order."""
    table = read_results(str(output))
    names = pc.replace_substring_regex(table.column("id"), ".*/", "")
    columns = (names, table.column("text"), table.column("status"))
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def read_names(output: Path) -> set[str]:
    return {name for name, _, _ in read_rows(output)} if (output / "data").exists() else set()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ALL_EVENTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        chaos = Chaos(Path(directory), args.rows)
        outcomes = []
        for number in range(args.runs):
            event = args.only or ALL_EVENTS[number % len(ALL_EVENTS)]
            outcomes.append(chaos.run(event, args.seed + number))
            print(f"{number + 1:3} {outcomes[-1]}", flush=True)
    _print_table(outcomes)
    sys.exit(not all(outcome.is_equal for outcome in outcomes))


def _print_table(outcomes: list[Outcome]) -> None:
    columns = ("is_hit", "is_equal", "attempts", "rows_read_again", "bytes_read_again", "written_rows_read_again")
    print(f"{'event':13}{'runs':>6}", *(f"{name:>{len(name) + 1}}" for name in columns))
    for event in ALL_EVENTS:
        some = [outcome for outcome in outcomes if outcome.event == event]
        sums = [sum(getattr(outcome, name) for outcome in some) for name in columns]
        print(f"{event:13}{len(some):6}", *(f"{n:{len(name) + 1}}" for name, n in zip(columns, sums, strict=True)))
    print(json.dumps({"runs": len(outcomes), "equal": sum(outcome.is_equal for outcome in outcomes)}))


if __name__ == "__main__":
    main()
