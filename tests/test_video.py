"""Frames of videos: the model card's indices, moviepy's pixels, every kind of file, and few frames decoded in vain."""

from __future__ import annotations

import math
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import MediaError
from pipelines.media.reference import Window
from pipelines.media.video.frames import Frame
from pipelines.media.video.sampling import Sampling, decode_frames_at, read_duration_s, sample_frames
from tests.support.photographs import find_photographs
from tests.support.videos import (
    CLIPS,
    SHOT_STARTS,
    draw_number,
    find_clip,
    join,
    read_number,
    set_display_matrix,
    write_repeated,
    write_sound,
    write_video,
)


def sample(path: Path, num_frames: int = 12, window: Window | None = None, **options: Any) -> list[Frame]:
    with path.open("rb") as file:
        size = options.pop("size", None)
        return sample_frames(file, Sampling(num_frames, **options), window, size)


def read_numbers(frames: list[Frame]) -> list[int]:
    return [read_number(frame.pixels) for frame in frames]


def open_moviepy(path: Path) -> Any:
    """Open moviepy's reader as its `VideoFileClip` does."""
    from moviepy.video.io.ffmpeg_reader import FFMPEG_VideoReader

    return FFMPEG_VideoReader(str(path), decode_file=False)


def choose_card_indices(count: int, num_frames: int) -> list[int]:
    """Choose frame indices with the model card's formula."""
    if count <= num_frames:
        return list(range(count))
    stride = count / num_frames
    return [min(count - 1, int((stride * i + stride * (i + 1)) / 2)) for i in range(num_frames)]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_the_model_cards_code(name: str) -> None:
    frames, moviepy = sample(find_clip(name)), open_moviepy(find_clip(name))
    indices = choose_card_indices(int(moviepy.fps * moviepy.duration), 12)
    assert [round(frame.timestamp_s * moviepy.fps, 2) for frame in frames] == indices
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [moviepy.get_frame(index / moviepy.fps) for index in indices]
    moviepy.close()
    for frame, picture in zip(frames, expected, strict=True):
        assert frame.pixels.shape == picture.shape
        difference = np.abs(frame.pixels.astype(int) - picture)
        if name == "cityCC0.mpg":  # 405 pixel rows: versions of ffmpeg scale half a row of colour differently
            assert difference.mean() < 1
        else:
            assert difference.max() == 0


@pytest.mark.parametrize(("width", "height"), [(850, 478), (102, 58), (2, 2)])
def test_frames_of_any_size_are_contiguous(tmp_path: Path, width: int, height: int) -> None:
    """FFmpeg's libav pads the rows of its frames."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(5)]
    path = write_video(tmp_path / "odd.mp4", pictures)
    frames = sample(path)
    assert all(frame.pixels.flags.c_contiguous for frame in frames)
    assert np.array_equal(np.stack([frame.pixels for frame in frames]), decode_by_ffmpeg(path, (height, width, 3)))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_upright(tmp_path: Path, rotation: int) -> None:
    path = write_video(tmp_path / "turned.mp4", 20, rotation=rotation)
    frames = sample(path, 20)
    assert np.array_equal(np.stack([frame.pixels for frame in frames]), decode_by_ffmpeg(path, frames[0].pixels.shape))
    assert sample(path, 3, size=(64, 32))[0].pixels.shape == (32, 64, 3)


ORIENTATIONS = {
    "as stored": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "upside down and mirrored": (1, 0, 0, -1),
    "half turn": (-1, 0, 0, -1),
    "quarter turn": (0, 1, -1, 0),
    "three quarters": (0, -1, 1, 0),
    "transposed": (0, 1, 1, 0),
    "transposed and half turn": (0, -1, -1, 0),
    "nothing is shown": (0, 0, 0, 0),
    "twice as large": (2, 0, 0, 2),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_all_orientations_are_shown_as_ffmpeg_shows_them(tmp_path: Path, name: str) -> None:
    a, b, c, d = ORIENTATIONS[name]
    path = set_display_matrix(write_video(tmp_path / "a.mp4", 5), (a, b, 0, c, d, 0, 0, 0, 1))
    frames = sample(path, 5)
    assert np.array_equal(np.stack([frame.pixels for frame in frames]), decode_by_ffmpeg(path, frames[0].pixels.shape))


def test_a_display_matrix_of_another_angle_is_not_applied(tmp_path: Path) -> None:
    """Phones write such angles by mistake; ffmpeg would turn the frames and leave black corners."""
    path = write_video(tmp_path / "a.mp4", 5)
    stored = sample(path, 1)[0].pixels
    cosine, sine = math.cos(math.radians(5)), math.sin(math.radians(5))
    set_display_matrix(path, (cosine, sine, 0, -sine, cosine, 0, 0, 0, 1))
    assert np.array_equal(sample(path, 1)[0].pixels, stored)


def decode_by_ffmpeg(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Decode all frames with the ffmpeg command, because moviepy stretches videos that are rotated by 90 degrees."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-f", "rawvideo"]
    result = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(result.stdout, np.uint8).reshape(-1, *shape)


KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "no-index.ts": {},
    "b-frames.mkv": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "no-duration.webm": {"codec": "libvpx", "options": {"live": "1"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "flash.flv": {"codec": "flv1"},
    "no-times.h264": {},
    "one-key-frame.mp4": {"key_every": 1000},
    "faststart.mov": {"options": {"movflags": "faststart"}},
    "fragments.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "10-bit.mp4": {"codec": "libx265", "pixel_format": "yuv420p10le"},
    "10-bit-422.mkv": {"pixel_format": "yuv422p10le"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_frames_asked_for(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, 200, **KINDS[name])
    frames = sample(path, 12)
    assert read_numbers(frames) == choose_card_indices(200, 12)
    assert [frame.timestamp_s for frame in frames] == pytest.approx(
        [n / 25 for n in choose_card_indices(200, 12)], abs=0.002
    )
    assert read_numbers(sample(path, 4, Window(2, 4))) == [56, 68, 81, 93]
    with path.open("rb") as file:
        assert read_numbers(decode_frames_at(file, [0.0, 4.0, 4.04, 7.96])) == [0, 100, 101, 199]


def test_an_mpeg_program_stream_without_a_frame_count_is_sampled(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mpg", 100, codec="mpeg2video")
    frames = sample(path, 12)
    assert len(frames) == 12
    # Its demuxer guesses the times of frames that share a packet, so ffmpeg itself is a frame off as well.
    assert read_numbers(frames) == pytest.approx([frame.timestamp_s * 25 for frame in frames], abs=1.1)


def test_frames_of_a_variable_rate_are_those_that_a_player_shows(tmp_path: Path) -> None:
    times = [i * 0.04 for i in range(20)] + [5 + i * 0.5 for i in range(20)]
    for suffix in ("mp4", "mkv"):
        path = write_video(tmp_path / f"variable.{suffix}", 40, times_s=times)
        with path.open("rb") as file:
            frames = decode_frames_at(file, [0.4, 3.0, 5.0, 7.3, 14.4])
        assert read_numbers(frames) == [10, 19, 20, 24, 38]
        assert [frame.timestamp_s for frame in frames] == pytest.approx([0.4, 0.76, 5.0, 7.0, 14.0], abs=0.01)


def test_short_videos_give_all_their_frames(tmp_path: Path) -> None:
    for count in (1, 2, 11, 12):
        assert read_numbers(sample(write_video(tmp_path / f"{count}.mp4", count))) == list(range(count))


def test_a_rate_can_only_reduce_the_number_of_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "8s.mp4", 200)
    assert len(sample(path, 12, fps=1)) == 8
    assert len(sample(path, 12, fps=0.01)) == 1
    assert len(sample(path, 12, fps=100)) == 12
    assert len(sample(path, 12, Window(2, 5), fps=2)) == 6


def test_candidates_are_resized(tmp_path: Path) -> None:
    frames = sample(write_video(tmp_path / "a.mp4", 100), 5, size=(128, 40))
    assert {frame.pixels.shape for frame in frames} == {(40, 128, 3)}
    assert read_numbers(frames) == choose_card_indices(100, 5)


def test_a_window_after_the_end_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "4s.mp4", 100)
    assert read_numbers(sample(path, 12, Window(3.92))) == [98, 99]
    with pytest.raises(MediaError, match=r"starts at 20 s, the video ends at 4 s"):
        sample(path, 12, Window(20, 30))


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.mp4": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text.mp4": (lambda path: path.write_text("not a video\n" * 100), "not a video"),
    "sound.m4a": (write_sound, "it holds audio"),
    "no-index.mp4": (lambda path: (write_video(path, 100), cut_in_half(path)), "header is damaged"),
    "short.mkv": (lambda path: (write_video(path, 100), cut_in_half(path)), r"ends at 2\.0 s, its header says 4\.0 s"),
    "short.mp4": (
        lambda path: (write_video(path, 100, options={"movflags": "faststart"}), cut_in_half(path)),
        "it is truncated",
    ),
    "playlist.m3u8": (
        lambda path: path.write_text(f"#EXTM3U\n#EXTINF:9,\n{find_clip('bikes.mp4')}\n#EXT-X-ENDLIST\n"),
        "not a video",
    ),
    "list.ffconcat": (
        lambda path: path.write_text(f"ffconcat version 1.0\nfile '{find_clip('bikes.mp4')}'\n"),
        "not a",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_and_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    make, message = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(MediaError, match=message):
        sample(tmp_path / name)


def test_a_window_in_the_intact_part_of_a_truncated_video_is_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", 100)
    cut_in_half(tmp_path / "a.mkv")
    assert read_numbers(sample(tmp_path / "a.mkv", 5, Window(0, 2))) == choose_card_indices(50, 5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_last_frame_is_given_once_while_the_sound_continues(tmp_path: Path, suffix: str) -> None:
    """The header gives the length of the picture stream, so the video does not count as truncated."""
    path = join(tmp_path / f"a.{suffix}", write_video(tmp_path / "v.mp4", 50), write_sound(tmp_path / "s.m4a", 8))
    assert read_numbers(sample(path, 4)) == [25, 49]
    assert read_numbers(sample(path, 4, as_card=True)) == [25, 49, 49, 49]


def test_damaged_packets_are_skipped(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 100, key_every=10)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    assert len(sample(path, 12)) == 12


def test_the_length_comes_from_the_header_or_is_measured(tmp_path: Path) -> None:
    for path in (
        write_video(tmp_path / "a.mp4", 100),
        write_video(tmp_path / "a.webm", 100, codec="libvpx", options={"live": "1"}),
    ):
        with path.open("rb") as file:
            assert read_duration_s(file) == pytest.approx(4.0, abs=0.05)


def measure_cpu_s(work: Callable[[], object]) -> float:
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_work_grows_with_the_frames_sampled_not_with_the_length(tmp_path: Path, suffix: str) -> None:
    """A video a hundred times as long takes less than three times as long."""
    short = write_video(tmp_path / "short.mp4", 500)
    long = write_repeated(tmp_path / f"long.{suffix}", short, 100)
    assert read_numbers(sample(long, 3)) == [int(500 * 100 * part) % 500 for part in (1 / 6, 1 / 2, 5 / 6)]
    once_s, often_s = (min(measure_cpu_s(lambda p=path: sample(p)) for _ in range(3)) for path in (short, long))
    assert often_s < 3 * once_s + 0.05


def test_sampling_a_few_frames_costs_a_fraction_of_decoding_all(tmp_path: Path) -> None:
    """Sampling 12 frames of a pan of 30 s took 5.8 times less than decoding all 901 to pixels."""
    import av

    photo = next(path for path in find_photographs() if path.name == "china.jpg")
    wide = np.asarray(Image.open(photo).resize((960, 540)))
    pictures = (np.roll(wide, 2 * i, axis=1)[100:370, :480] for i in range(901))
    path = write_video(tmp_path / "30s.mp4", pictures, fps=30, key_every=90)

    def decode_all() -> None:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")

    some_s = min(measure_cpu_s(lambda: sample(path)) for _ in range(3))
    assert measure_cpu_s(decode_all) > 3 * some_s


def test_the_shots_of_a_real_clip_start_where_other_tests_assume() -> None:
    with find_clip("bikes.mp4").open("rb") as file:
        frames = decode_frames_at(file, [i / 25 for i in range(250)])
    small = np.stack([frame.pixels[::8, ::8] for frame in frames]).astype(int)
    jumps = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
    assert sorted(np.argsort(-jumps)[:5] + 1) == list(SHOT_STARTS[1:])


def test_drawn_numbers_can_be_read() -> None:
    assert all(read_number(draw_number(number)) == number for number in range(0, 65536, 997))
