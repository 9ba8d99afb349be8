"""`ray job submit` to a cluster that `ray start` made, as the README says it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from pipelines.output.sink import read_results
from tests.support.clusters import RayHead
from tests.support.pictures import write_demo_pictures
from tests.support.processes import against_the_clock

NUM_ROWS = 120


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    ray_head = RayHead()
    yield ray_head
    ray_head.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_pictures(tmp_path_factory.mktemp("pictures"), NUM_ROWS)


@against_the_clock
def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: RayHead, pictures: Path, tmp_path: Path
) -> None:
    """On two ranks. The same line, the same output, each row once."""
    arguments = [pictures, tmp_path / "out", "--model", "demo", "--tensor-parallel", 2, "--rows-per-file", 4]
    command = ["--working-dir", ".", "--", "python", "-m", "jobs.caption", *map(str, arguments)]
    client = JobSubmissionClient(head.dashboard)
    job = head.run_ray_job("submit", "--submission-id", "first", *command)
    while not any((tmp_path / "out").glob("data/*.parquet")):  # the first rows are written
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    assert client.stop_job("first")  # what `ray job stop` does, without its start
    seen, _ = job.communicate(timeout=400)
    # What the driver itself says may come after the three seconds that it is given: ranks have the cores.
    assert "in 2 ranks" in seen and "was stopped" in seen
    done = read_results(str(tmp_path / "out"))
    assert 0 < len(done) < NUM_ROWS, "stopped too late"
    code, seen = head.submit(*arguments)
    assert code == 0, seen
    [summary] = [json.loads(line) for line in seen.splitlines() if line.startswith('{"rows"')]
    assert (summary["rows"], summary["ok"]) == (NUM_ROWS, NUM_ROWS)
    assert summary["skipped_done"] >= len(done)
    assert len(set(read_results(str(tmp_path / "out")).column("id").to_pylist())) == NUM_ROWS
    assert "succeeded" in seen


@pytest.mark.slow
def test_exit_codes_and_what_the_user_sees(head: RayHead, pictures: Path, tmp_path: Path) -> None:
    """The client's own code is 0 or 1; the job's is in the log, with the reason."""
    code, seen = head.submit(tmp_path / "nothing", tmp_path / "out", "--model", "demo")
    assert code == 1
    assert "failed with exit code 2" in seen and "nothing' does not exist" in seen
    code, seen = head.submit(pictures, tmp_path / "gpu", "--model", "demo", "--device", "cuda")
    assert code == 1
    assert "failed with exit code 2" in seen and "the cluster has no GPU; use --device cpu" in seen
    (tmp_path / "mixed").mkdir()
    for i, picture in enumerate(sorted(pictures.iterdir())[:20]):
        (tmp_path / "mixed" / picture.name).symlink_to(picture)
        (tmp_path / "mixed" / f"empty-{i}.png").touch()
    code, seen = head.submit(tmp_path / "mixed", tmp_path / "half", "--model", "demo", "--max-new-tokens", 2)
    assert code == 1
    assert "failed with exit code 3" in seen and "The most frequent reasons" in seen and '"error": 20' in seen
