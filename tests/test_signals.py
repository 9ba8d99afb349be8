"""A signal at any moment stops a job without a trace, with exit code 1, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.output.sink import read_results
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import draw
from tests.support.processes import Finished, Job, against_the_clock, list_files, wait_for

MODEL = str(checkpoint_dir("tiny56-tied"))
NUM_ROWS = 60
SLOW_SIGNALS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    for i in range(NUM_ROWS):
        draw(directory / f"{i:02}.png", seed=i, width=600, height=500)
    return directory


def start_job(
    pictures: Path, output: Path, ray_address: str | None = None, hangups: signal.Handlers = signal.SIG_DFL
) -> Job:
    """Start a job; it inherits how hangups are handled, which `nohup` around the tests changes."""
    options = ["--model", MODEL, "--max-new-tokens", "64", "--rows-per-file", "2"]
    before = signal.signal(signal.SIGHUP, hangups)
    try:
        return Job(["jobs.caption", str(pictures), str(output), *options], ray_address).start()
    finally:
        signal.signal(signal.SIGHUP, before)


def check_stopped(job: Job) -> Finished:
    stopped = job.finish(60)
    job.wait_until_all_gone()
    assert stopped.exit_code == 1, stopped
    assert "Traceback" not in stopped.stderr and "stopped" in stopped.stderr and not stopped.stdout
    return stopped


def has_child(name: str) -> Callable[[Job], bool]:
    """Return whether Ray's process of this name runs for the job."""
    return lambda job: any(name in found for found in job._find_descendants().values())


@against_the_clock
@pytest.mark.parametrize("number", [signal.SIGINT, *SLOW_SIGNALS])
def test_a_signal_during_the_imports_leaves_no_trace(pictures: Path, tmp_path: Path, number: signal.Signals) -> None:
    job = start_job(pictures, tmp_path / "out")
    wait_for(lambda: b"pydantic" in Path(f"/proc/{job.process.pid}/maps").read_bytes(), 30)
    job.process.send_signal(number)
    assert check_stopped(job).stderr == "stopped\n"
    assert not (tmp_path / "out").exists()


@against_the_clock
@pytest.mark.parametrize("number", [signal.SIGINT, *SLOW_SIGNALS])
@pytest.mark.parametrize("child", ["gcs_server", pytest.param("raylet", marks=pytest.mark.slow)])
def test_a_signal_while_ray_starts_leaves_no_trace(
    pictures: Path, tmp_path: Path, number: signal.Signals, child: str
) -> None:
    job = start_job(pictures, tmp_path / "out")
    wait_for(lambda: has_child(child)(job), 60)
    job.process.send_signal(number)
    assert "OUTPUT is unchanged" in check_stopped(job).stderr
    assert not (tmp_path / "out").exists()


@against_the_clock
def test_a_second_interrupt_stops_at_once_and_the_run_is_resumed(
    ray_address: str, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = start_job(pictures, output, ray_address)
    wait_for(lambda: len(list_files(output)) > 1, 120)
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.15)
    interrupted_s = time.monotonic()
    job.process.send_signal(signal.SIGINT)
    stopped = check_stopped(job)
    assert time.monotonic() - interrupted_s < 5
    assert "press Ctrl-C again" in stopped.stderr
    resumed = start_job(pictures, output, ray_address).finish()
    assert (resumed.exit_code, resumed.summary["ok"]) == (0, NUM_ROWS), resumed.stderr
    assert resumed.summary["skipped_done"] > 0
    assert len(read_results(str(output))) == NUM_ROWS


@pytest.mark.slow
@against_the_clock
@pytest.mark.parametrize("pause_s", [0.15, 1.0])
@pytest.mark.parametrize("child", ["gcs_server", "raylet", "ray::MapWorker"])
def test_a_second_interrupt_leaves_no_process_of_a_local_ray(
    pictures: Path, tmp_path: Path, child: str, pause_s: float
) -> None:
    job = start_job(pictures, tmp_path / "out")
    wait_for(lambda: has_child(child)(job), 60)
    job.process.send_signal(signal.SIGINT)
    time.sleep(pause_s)
    job.process.send_signal(signal.SIGINT)
    check_stopped(job)
    resumed = start_job(pictures, tmp_path / "out").finish()
    assert (resumed.exit_code, resumed.summary["ok"]) == (0, NUM_ROWS), resumed.stderr


@against_the_clock
def test_a_hangup_writes_finished_rows_as_a_termination_does(ray_address: str, pictures: Path, tmp_path: Path) -> None:
    job = start_job(pictures, tmp_path / "out", ray_address)
    wait_for(lambda: bool(list_files(tmp_path / "out")), 120)
    job.process.send_signal(signal.SIGHUP)
    job.process.send_signal(signal.SIGHUP)  # a terminal that closes signals a job twice
    assert "Finished rows are saved" in check_stopped(job).stderr
    assert not (tmp_path / "out" / "driver.json").exists()


def test_signals_that_the_caller_ignores_stay_ignored(pictures: Path, tmp_path: Path) -> None:
    """As `nohup` has it."""
    job = start_job(pictures, tmp_path / "out", hangups=signal.SIG_IGN)
    wait_for(lambda: b"pyarrow" in Path(f"/proc/{job.process.pid}/maps").read_bytes(), 30)
    os.kill(job.process.pid, signal.SIGHUP)
    time.sleep(0.2)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    check_stopped(job)
