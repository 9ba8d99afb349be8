"""`ray job submit` works on a cluster started with `ray start`, as the README describes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from pipelines.monitoring.metrics import METRICS
from pipelines.output.sink import read_results
from tests.support.clusters import RayHead
from tests.support.metrics import Scraper
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
def test_a_stopped_job_resumes_when_it_is_submitted_again(head: RayHead, pictures: Path, tmp_path: Path) -> None:
    """The job runs on two ranks; the same command with the same output writes each row once."""
    arguments = [pictures, tmp_path / "out", "--model", "demo", "--tensor-parallel", 2, "--rows-per-file", 4]
    command = ["--working-dir", ".", "--", "python", "-m", "jobs.caption", *map(str, arguments)]
    client = JobSubmissionClient(head.dashboard)
    job = head.run_ray_job("submit", "--submission-id", tmp_path.name, *command)
    while not any((tmp_path / "out").glob("data/*.parquet")):  # until the first rows are written
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    assert client.stop_job(
        tmp_path.name
    )  # the call of `ray job stop`, without the seconds that the command takes to start
    log, _ = job.communicate(timeout=400)
    # The driver's own messages may miss the three seconds that it gets, because the ranks occupy the cores.
    assert "2 ranks" in log and "was stopped" in log
    done = read_results(str(tmp_path / "out"))
    assert 0 < len(done) < NUM_ROWS, "stopped too late"
    with Scraper(head.metrics_port) as scraper:
        code, log = head.submit(*arguments)
    assert code == 0, log
    check_metrics(scraper.found)
    [summary] = [json.loads(line) for line in log.splitlines() if line.startswith('{"rows"')]
    assert (summary["rows"], summary["ok"]) == (NUM_ROWS, NUM_ROWS)
    assert summary["skipped_done"] >= len(done)
    assert len(set(read_results(str(tmp_path / "out")).column("id").to_pylist())) == NUM_ROWS
    assert "succeeded" in log


def check_metrics(found: dict[str, set[str]]) -> None:
    """Check that the metrics port exported all metrics of the run, with their labels."""
    assert found.keys() == METRICS.keys()
    for name, samples in found.items():
        assert all('run="out"' in labels for labels in samples)
        assert all(f'{label}="' in labels for labels in samples for label in METRICS[name][1])
    stages = {re.search(r'stage="(\w+)"', labels)[1] for labels in found["ovis2_stage_busy_ratio"]}  # type: ignore[index]
    assert stages == {"driver", "preprocessor", "replica"}


@pytest.mark.slow
def test_the_log_of_a_failed_job_has_its_exit_code_and_reason(head: RayHead, pictures: Path, tmp_path: Path) -> None:
    """The client exits with 0 or 1; the job's own exit code is in the log, with the reason."""
    code, log = head.submit(tmp_path / "nothing", tmp_path / "out", "--model", "demo")
    assert code == 1
    assert "failed with exit code 2" in log and "nothing' does not exist" in log
    code, log = head.submit(pictures, tmp_path / "gpu", "--model", "demo", "--device", "cuda")
    assert code == 1
    assert "failed with exit code 2" in log and "the cluster has no GPU; use --device cpu" in log
    (tmp_path / "mixed").mkdir()
    for i, picture in enumerate(sorted(pictures.iterdir())[:20]):
        (tmp_path / "mixed" / picture.name).symlink_to(picture)
        (tmp_path / "mixed" / f"empty-{i}.png").touch()
    code, log = head.submit(tmp_path / "mixed", tmp_path / "half", "--model", "demo", "--max-new-tokens", 2)
    assert code == 1
    assert "failed with exit code 3" in log and "The most frequent reasons" in log and '"error": 20' in log
