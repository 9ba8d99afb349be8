"""The whole job on fifty drawn videos, ten of them broken, killed once: every row is written once, with its times."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.output.sink import read_results
from tests.support.processes import Job, OpenCounter, against_the_clock, run_caption
from tests.support.roots import TINY_SIGLIP
from tests.support.videos import write_sound, write_video

NUM_GOOD = 40


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("videos")
    for number in range(NUM_GOOD):
        suffix, codec = [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")][number % 4]
        write_video(directory / f"{number:02}.{suffix}", 40 + number, codec=codec)
    whole = (directory / "00.mp4").read_bytes()
    for number in range(3):
        (directory / f"cut{number}.mp4").write_bytes(whole[: len(whole) * (number + 1) // 4])
        (directory / f"text{number}.mp4").write_text("no video at all\n" * 10 * number)
        write_sound(directory / f"sound{number}.m4v", 0.2)
    cut = (directory / "39.avi").read_bytes()
    (directory / "head.avi").write_bytes(cut[:200])
    return directory


def make_arguments(videos: Path, output: Path, *options: str) -> list[str]:
    common = ["--model", "demo", "--max-new-tokens", "8", "--num-frames", "4", "--max-error-rate", "0.3"]
    return [str(videos), str(output), *common, "--rows-per-file", "4", *options]


@pytest.mark.slow
@against_the_clock
def test_a_killed_job_is_resumed(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = Job(["jobs.caption", *make_arguments(videos, output)]).start()
    while job.process.poll() is None and not any(output.glob("data/*.parquet")):
        time.sleep(0.01)
    job.kill()
    job.wait_until_all_gone()
    done = {Path(str(id_)).name for id_ in read_results(str(output)).column("id").to_pylist()}
    assert 0 < len(done) < 50

    with OpenCounter(videos) as counter:
        finished = run_caption(*make_arguments(videos, output))
    assert finished.exit_code == 0, finished.stderr
    assert (finished.summary["ok"], finished.summary["error"], finished.summary["skipped_done"]) == (40, 10, len(done))
    assert not done & counter.opens.keys()

    rows = read_results(str(output)).to_pylist()
    assert [Path(row["id"]).name for row in rows] == sorted(path.name for path in videos.iterdir())
    for number, row in enumerate(rows[:NUM_GOOD]):
        count = int(25.0 * ((40 + number) / 25))  # in floats, as the model card counts
        indices = [int((count / 4 * i + count / 4 * (i + 1)) / 2) for i in range(4)]
        assert (row["status"], row["num_images"], row["num_tiles"]) == ("ok", 4, 4)
        assert np.allclose(row["frame_timestamps_s"], [index / 25 for index in indices], atol=0.002)
        assert row["prompt"] == "Describe the video."
        assert row["text"]
    for row in rows[NUM_GOOD:]:
        assert (row["status"], row["stage"], row["frame_timestamps_s"]) == ("error", "decode", [])
        assert row["error"]


def test_frames_are_chosen_by_an_encoder_in_an_actor(videos: Path, tmp_path: Path) -> None:
    """The actor exits with the job, as all its processes do."""
    output = tmp_path / "out"
    options = [
        "--frame-selection",
        "mdp3",
        "--frame-encoder",
        str(TINY_SIGLIP),
        "--num-candidates",
        "16",
        "--limit",
        "6",
    ]
    finished = run_caption(*make_arguments(videos, output, *options))
    assert finished.exit_code == 0, finished.stderr
    rows = read_results(str(output)).to_pylist()
    assert [len(row["frame_timestamps_s"]) for row in rows] == [4] * 6
    assert all((np.diff(row["frame_timestamps_s"]) > 0).all() for row in rows)

    changed = run_caption(*make_arguments(videos, output, *options[:2], "--frame-encoder", "pixels", *options[4:]))
    assert changed.exit_code == 2
    assert "frame-encoder" in changed.stderr


def test_an_unusable_encoder_is_refused_before_the_run(videos: Path, tmp_path: Path) -> None:
    for encoder, reason in (("demo", "model type 'ovis'"), (str(tmp_path / "nowhere"), "cannot find model")):
        options = ["--frame-selection", "mdp3", "--frame-encoder", encoder]
        finished = run_caption(*make_arguments(videos, tmp_path / "out", *options))
        assert finished.exit_code == 2
        assert reason in finished.stderr
        assert f"--frame-encoder {encoder}" in finished.stderr
