"""A driver killed at any moment loses no row, repeats none, and opens no finished image again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from pipelines.output.sink import read_results
from tests.support.pictures import write_demo_pictures
from tests.support.processes import Job, OpenCounter, against_the_clock, list_files, run_caption, run_job, wait_for

NUM_ROWS = 160
MAX_PAUSE_S = 12.0  # about the duration of a run
TASKS = """
- {name: caption, prompt: "Describe the image.", max_new_tokens: 24}
- {name: round, prompt: "Is it round?", answer: bool}
- {name: tags, prompt: "Tags?", answer: "list[str]", max_new_tokens: 8}
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_pictures(tmp_path_factory.mktemp("pictures"), NUM_ROWS)


def run_undisturbed(job: str, pictures: Path, output: Path, ray_address: str) -> list[dict[str, object]]:
    """Run the job undisturbed; return its rows."""
    finished = run_job(job, *make_arguments(pictures, output, job), ray_address=ray_address)
    assert finished.exit_code == 0, finished.stderr
    return read_rows(output)


def kill_at_work(job: Job, output: Path, pause_s: float | None) -> None:
    """SIGKILL the driver after it has written another file, or after `pause_s`."""
    if pause_s is None:
        before = list_files(output)
        wait_for(lambda: job.process.poll() is not None or list_files(output) != before, 100)
    else:
        time.sleep(pause_s)
    job.kill()
    job.wait_until_all_gone()


def make_arguments(pictures: Path, output: Path, job: str = "caption") -> list[str]:
    # Small files, so that finished work is on disk at most moments of a short run.
    options = ["--model", "demo", "--max-new-tokens", "24", "--rows-per-file", "8"]
    if job == "annotate":
        (pictures.parent / "tasks.yaml").write_text(TASKS)
        options += ["--tasks", str(pictures.parent / "tasks.yaml")]
    return [str(pictures), str(output), *options]


def read_rows(output: Path) -> list[dict[str, object]]:
    """Read all rows without probabilities, whose last bits may depend on the batch."""
    table = read_results(str(output))
    inexact = [name for name in table.column_names if name == "mean_logprob" or name.endswith("_confidence")]
    rows: list[dict[str, object]] = table.drop_columns(inexact).to_pylist()
    return rows


@against_the_clock
@pytest.mark.parametrize(
    ("kills", "job_name"),
    [
        (1, "caption"),
        pytest.param(1, "annotate", marks=pytest.mark.slow),
        pytest.param(10, "caption", marks=pytest.mark.slow),
        pytest.param(10, "annotate", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_repeatedly_equals_an_undisturbed_one(
    ray_address: str, pictures: Path, tmp_path: Path, kills: int, job_name: str
) -> None:
    whole = run_undisturbed(job_name, pictures, tmp_path / "whole", ray_address)
    rng = random.Random(kills)
    output = tmp_path / "out"
    for kill in range(kills):
        done_before = list_done_names(output)
        with OpenCounter(pictures) as counter:
            job = Job([f"jobs.{job_name}", *make_arguments(pictures, output, job_name)]).start()
            # The first kill hits while rows are being written, the others at any moment.
            kill_at_work(job, output, rng.uniform(0, MAX_PAUSE_S) if kill else None)
        assert not done_before & counter.opens.keys()
        assert kill or 0 < len(list_done_names(output)) < NUM_ROWS, "killed too late"
    done_before = list_done_names(output)
    with OpenCounter(pictures) as counter:
        finished = run_job(job_name, *make_arguments(pictures, output, job_name))
    assert finished.exit_code == 0, finished.stderr
    assert finished.summary["skipped_done"] == len(done_before)
    assert finished.summary["rows"] == finished.summary["ok"] == NUM_ROWS
    assert set(counter.opens) == {path.name for path in pictures.iterdir()} - done_before
    assert max(counter.opens.values(), default=1) == 1
    assert read_rows(output) == whole


def list_done_names(output: Path) -> set[str]:
    return {Path(str(row["id"])).name for row in read_rows(output)}


def test_a_finished_run_opens_nothing_and_starts_no_ray(ray_address: str, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    some = pictures / "000*.png"
    assert run_caption(*make_arguments(some, output), ray_address=ray_address).exit_code == 0
    unused = "127.0.0.1:1"
    refused = run_caption(*make_arguments(some, tmp_path / "other"), ray_address=unused)
    assert refused.exit_code == 2 and f"RAY_ADDRESS={unused}" in refused.stderr
    with OpenCounter(pictures) as counter:
        again = run_caption(*make_arguments(some, output), ray_address=unused)
    assert not counter.opens
    assert again.summary["skipped_done"] == again.summary["rows"] == 10


@against_the_clock
def test_a_terminated_run_saves_its_finished_rows(pictures: Path, tmp_path: Path) -> None:
    """`ray job stop` sends SIGTERM and, three seconds later, SIGKILL."""
    output = tmp_path / "out"
    # The pictures several times over, so that most rows are unfinished when the first arrive.
    more = [f"--input={pictures}"] * 3 + ["--on-duplicate-id", "suffix", "--rows-per-file", "10000"]
    job = Job(["jobs.caption", *make_arguments(pictures, output), *more]).start()
    assert job.process.stderr is not None
    for line in job.process.stderr:
        if " rows, " in line:  # the first rows have arrived
            break
    job.process.send_signal(signal.SIGTERM)
    finished = job.finish()
    job.wait_until_all_gone()
    assert finished.exit_code == 1
    assert "stopped. Finished rows are saved" in finished.stderr
    assert 0 < len(read_rows(output)) < 4 * NUM_ROWS
