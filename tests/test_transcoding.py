"""A video whose codec PyAV lacks is read with the ffmpeg binary of the extra, in the same process with limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from pipelines.errors import MediaError
from pipelines.media.reference import VideoLocation, Window
from pipelines.media.video.frames import Tiling
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.sampling import Sampling, sample_frames
from pipelines.media.video.shots import Cutting
from tests.support.job_configs import make_job_config
from tests.support.stages import prepare_rows
from tests.support.videos import draw_shots, read_number, write_video

BINARY = imageio_ffmpeg.get_ffmpeg_exe()


def write_avs2(path: Path, source: Path) -> Path:
    """Encode `source` as AVS2, which PyAV does not decode; without B-frames, whose times its encoder loses."""
    codec = ["-c:v", "libxavs2", "-xavs2-params", "BFrames=0:NumberBFrames=0", "-b:v", "2M"]
    command = [BINARY, "-v", "error", "-y", "-i", str(source), *codec, str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


@pytest.fixture(scope="module", autouse=True)
def skip_without_encoder() -> None:
    if "libxavs2" not in subprocess.run([BINARY, "-encoders"], capture_output=True, text=True).stdout:
        pytest.skip("this build of ffmpeg encodes no codec that PyAV lacks")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("avs2")
    path = write_avs2(directory / "a.mkv", write_video(directory / "a.mp4", 60))
    with path.open("rb") as file, pytest.raises(MediaError, match="codec is unknown"):
        sample_frames(file, Sampling(1))
    return path


@pytest.fixture
def decoder() -> VideoDecoder:
    return VideoDecoder()


def test_frames_are_those_of_ffmpeg_at_the_times_of_any_video(clip: Path, decoder: VideoDecoder) -> None:
    """A file is read in place; bytes, and a part of another file, are copied."""
    data, shard = clip.read_bytes(), clip.with_suffix(".tar")
    shard.write_bytes(bytes(1000) + data + bytes(77))
    raw = subprocess.run(
        [BINARY, "-v", "error", "-i", str(clip), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True
    )
    every = np.frombuffer(raw.stdout, np.uint8).reshape(60, 64, 256, 3)
    for place in (VideoLocation(str(clip)), VideoLocation("", data=data), VideoLocation(str(shard), 1000, len(data))):
        frames = decoder.sample_frames(place, Sampling(4))
        assert [read_number(frame.pixels) for frame in frames] == [7, 22, 37, 52]
        assert all(np.array_equal(frame.pixels, every[read_number(frame.pixels)]) for frame in frames)
    frames = decoder.decode_frames_at(VideoLocation(str(clip)), [0.0, 2.36])
    assert [read_number(frame.pixels) for frame in frames] == [0, 59]


def test_the_facts_are_those_of_the_file(clip: Path, decoder: VideoDecoder) -> None:
    info = decoder.tile_frames(VideoLocation(str(clip)), Sampling(2), Tiling(1, 56), Window(1, 2)).info
    assert (info.format, info.codec, info.width, info.height) == ("matroska", "avs2", 256, 64)
    assert (info.num_bytes, info.fps, info.duration_s) == (clip.stat().st_size, 25, pytest.approx(2.4, abs=0.05))


def test_shots_are_found(tmp_path: Path, decoder: VideoDecoder) -> None:
    path = write_avs2(tmp_path / "a.mkv", write_video(tmp_path / "a.mp4", draw_shots(25, 25)))
    assert decoder.find_cuts(VideoLocation(str(path)), Cutting(at_shots=True), Window()) == [1.0]


def test_no_process_or_file_is_left(
    clip: Path, decoder: VideoDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    decoder.sample_frames(VideoLocation("", data=clip.read_bytes()), Sampling(1))
    assert decoder._process is not None
    pid = decoder._process.pid
    assert not list(tmp_path.iterdir())
    assert not Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()


def test_what_neither_reads_keeps_the_first_reason(decoder: VideoDecoder, tmp_path: Path) -> None:
    """A playlist is not opened by either: it names other files."""
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    for place in (VideoLocation("", data=b"no video" * 99), VideoLocation(str(tmp_path / "a.mp4"))):
        with pytest.raises(MediaError, match=r"^not a video, or its header is damaged: Invalid \w+"):
            decoder.sample_frames(place, Sampling(1))


def test_an_error_row_names_the_extra_where_it_is_missing(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden"
    (hidden / "imageio_ffmpeg").mkdir(parents=True)
    (hidden / "imageio_ffmpeg" / "__init__.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setattr(sys, "path", [str(hidden), *sys.path])  # the decoder's process has the same path
    [row] = prepare_rows(make_job_config([clip], tmp_path / "out"))
    assert row.stage == "decode"
    assert row.error == (
        "the video's codec is unknown, or its header is damaged; pip install 'ovis2-ray[video]' for an ffmpeg that "
        "reads more formats"
    )
