"""Cuts are found where the content changes, on drawn videos and on real clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import MediaError
from pipelines.media.reference import VideoLocation, Window
from pipelines.media.video.frames import Frame
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.shots import Cutting, drop_short_shots, find_cuts, find_shots
from tests.support.videos import SHOT_STARTS, draw_shots, find_clip, write_video

SHOTS = Cutting(at_shots=True)


def cut(path: Path, cutting: Cutting = SHOTS, window: Window | None = None) -> list[float]:
    with path.open("rb") as file:
        return find_cuts(file, cutting, window or Window())


def to_frames(pictures: list[np.ndarray]) -> list[Frame]:
    return [Frame(picture, number / 25) for number, picture in enumerate(pictures)]


@pytest.mark.parametrize("fps", [25, 12])
def test_every_shot_begins_at_its_first_frame(tmp_path: Path, fps: int) -> None:
    path = write_video(tmp_path / "a.mp4", draw_shots(30, 25, 40, 20, 35), fps=fps)
    assert cut(path) == [round(number / fps, 3) for number in (30, 55, 95, 115)]


def test_the_shots_of_a_real_clip_are_found_to_the_frame() -> None:
    """The last one lasts 0.3 s and is joined to the one before."""
    assert cut(find_clip("bikes.mp4")) == [number / 25 for number in SHOT_STARTS[1:-1]]
    assert cut(find_clip("bikes.mp4"), Cutting(at_shots=True, min_shot_s=0.3)) == [n / 25 for n in SHOT_STARTS[1:]]
    assert cut(find_clip("cityCC0.mpg")) == pytest.approx([116 / 25], abs=0.081)


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_a_clip_of_one_shot_is_not_cut(name: str) -> None:
    assert cut(find_clip(name)) == []


def test_a_slow_fade_and_noise_are_no_cuts() -> None:
    random = np.random.default_rng(0)
    fade = [np.full((36, 64, 3), level * 2, np.uint8) for level in range(120)]
    noise = [random.integers(100, 130, (36, 64, 3), np.uint8) for _ in range(50)]
    assert list(find_shots(to_frames(fade))) == []
    assert list(find_shots(to_frames(noise))) == []


def test_a_difference_that_stands_out_is_a_cut_only_among_calm_frames() -> None:
    """The same step of brightness is a cut between still frames, and motion between frames that always differ."""
    still = [np.full((36, 64, 3), 60 + 60 * (number >= 20), np.uint8) for number in range(40)]
    moving = [np.full((36, 64, 3), 60 + 60 * (number % 2), np.uint8) for number in range(40)]
    assert list(find_shots(to_frames(still))) == [20 / 25]
    assert list(find_shots(to_frames(moving))) == []


def test_short_shots_are_joined() -> None:
    assert drop_short_shots([0.2, 1.0, 1.3, 1.9, 4.7], 0.0, 5.0, 0.6) == [1.0, 1.9]
    assert drop_short_shots([0.2, 1.0], 0.0, 5.0, 0.0) == [0.2, 1.0]
    assert drop_short_shots([], 0.0, 0.1, 0.6) == []


def test_long_shots_are_cut_into_windows(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", draw_shots(50, 100))
    assert cut(path, Cutting(window_s=2)) == [2, 4]
    assert cut(path, Cutting(at_shots=True, window_s=2)) == [2, 4]
    assert cut(path, Cutting(at_shots=True, window_s=1)) == [1, 2, 3, 4, 5]
    assert cut(path, Cutting(at_shots=True, window_s=60)) == [2]


def test_only_the_window_is_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", draw_shots(30, 25, 40, 20))
    assert cut(path, window=Window(1.6, 4.0)) == [55 / 25]
    assert cut(path, window=Window(3.0)) == [95 / 25]
    assert cut(path, Cutting(window_s=0.5), Window(1, 2.5)) == [1.5, 2]


def test_too_many_parts_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 25)
    with pytest.raises(MediaError, match="more than 100,000 parts"):
        cut(path, Cutting(window_s=1e-6))


def test_a_truncated_video_is_not_cut(tmp_path: Path) -> None:
    """With its index at the start, its header still states the whole length."""
    whole = write_video(tmp_path / "a.mkv", draw_shots(100, 100)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match="truncated"):
        cut(tmp_path / "cut.mkv")


def test_the_decoder_process_finds_the_same_cuts(tmp_path: Path) -> None:
    clip = find_clip("bikes.mp4")
    decoder = VideoDecoder()
    try:
        assert decoder.find_cuts(VideoLocation(str(clip)), SHOTS, Window()) == cut(clip)
        location = VideoLocation("cell", data=clip.read_bytes())
        assert decoder.find_cuts(location, Cutting(window_s=3), Window(2)) == [5, 8]
        (tmp_path / "broken.mp4").write_bytes(b"broken")
        with pytest.raises(MediaError, match="not a video"):
            decoder.find_cuts(VideoLocation(str(tmp_path / "broken.mp4")), SHOTS, Window())
    finally:
        decoder.close()
