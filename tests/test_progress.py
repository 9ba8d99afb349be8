"""A job logs its rates and the time left."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipelines.monitoring import progress
from pipelines.monitoring.progress import Progress, RunProgress


def make_columns(num_rows: int, num_errors: int) -> pa.Table:
    """Make columns of result rows with ten tokens each."""
    status = ["error"] * num_errors + ["ok"] * (num_rows - num_errors)
    return pa.table({"status": status, "num_output_tokens": [10] * num_rows})


def test_the_startup_does_not_count_for_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with RunProgress(num_rows=1000, num_done=100) as run:
        now_s = 60.0  # actors start, the model loads
        run.add(make_columns(10, 1))
        now_s = 70.0
        run.add(make_columns(90, 0))
        now_s = 81.0
        run.add(make_columns(99, 0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "110/1000 rows, 0.2 rows/s, 2 tokens/s, 1 error, ETA 1:29:00"
    assert lines[-1] == "299/1000 rows, 9.0 rows/s, 90 tokens/s, 1 error, ETA 0:01:18"


def test_a_short_job_logs_its_first_and_last_row(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("rows counted", total=3) as counted:
        for _ in range(3):
            counted.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["1/3 rows counted", "3/3 rows counted"]
