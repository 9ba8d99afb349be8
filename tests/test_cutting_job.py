"""The whole job cuts videos at their shots on Ray: killed while it searches and while it captions, then resumed."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.output.sink import read_results
from tests.support.processes import Job, against_the_clock, run_caption
from tests.support.videos import draw_shots, write_video

NUM_CLIPS = 50


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write clips of one to four shots of a second, and five files that are no videos."""
    directory = tmp_path_factory.mktemp("clips")
    for number in range(NUM_CLIPS - 5):
        write_video(directory / f"{number:02}.mp4", draw_shots(*[25] * (1 + number % 4)))
    for number in range(5):
        (directory / f"text{number}.mp4").write_text("no video at all\n" * number)
    return directory


def kill_when(job: Job, pattern: str) -> None:
    """Kill the driver as soon as OUTPUT holds a file of this pattern."""
    output = Path(job.arguments[2])
    job.start()
    while job.process.poll() is None and not any(output.glob(pattern)):
        time.sleep(0.01)
    job.kill()
    job.wait_until_all_gone()


@against_the_clock
@pytest.mark.slow
def test_a_job_that_cuts_at_shots_is_killed_twice_and_resumed(clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    saved = tmp_path / "frames"
    options = ["--split", "shots", "--model", "demo", "--max-new-tokens", "4", "--num-frames", "3"]
    options += ["--media-columns", "--save-frames", str(saved)]
    arguments = [str(clips), str(output), *options, "--max-error-rate", "0.3", "--rows-per-file", "4"]
    kill_when(Job(["jobs.caption", *arguments]), "cuts/data/*.parquet")
    assert not (output / "run.json").exists()
    searched = len(read_results(str(output / "cuts")))
    assert 0 < searched < NUM_CLIPS

    kill_when(Job(["jobs.caption", *arguments]), "data/*.parquet")
    done = len(read_results(str(output)))
    finished = run_caption(*arguments)
    assert finished.exit_code == 0, finished.stderr
    rows = read_results(str(output)).to_pylist()
    assert (finished.summary["error"], finished.summary["skipped_done"]) == (5, done)
    assert len({row["id"] for row in rows}) == len(rows) == sum(1 + number % 4 for number in range(NUM_CLIPS - 5)) + 5
    parts = Counter(Path(row["id"].partition("#")[0]).name for row in rows)
    assert [parts[f"{number:02}.mp4"] for number in range(NUM_CLIPS - 5)] == [1 + n % 4 for n in range(NUM_CLIPS - 5)]
    for row in rows:
        assert (row["status"] == "error") == ("/text" in row["id"]), row
        if "#t=" in row["id"]:
            second = float(row["id"].rpartition("#t=")[2].split(",")[0])
            assert np.floor(row["frame_timestamps_s"]).tolist() == [second] * 3
        if row["status"] == "ok":
            assert (row["width"], row["height"], row["codec"]) == (96, 64, "h264")
            assert [Image.open(saved / name).size for name in row["saved_frames"]] == [(96, 64)] * 3
    names = [name for row in rows for name in row["saved_frames"]]
    assert {str(path.relative_to(saved)) for path in saved.rglob("*.*")} == set(names)
