"""Videos that players show differently than they are stored, or only in part: streams, repeats, damage, encryption."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import MediaError
from pipelines.media.reference import Window
from pipelines.media.video.frames import Frame, Tiling, VideoInfo
from pipelines.media.video.sampling import Sampling, decode_frames_at, sample_frames, tile_frames
from tests.support.videos import damage_packets, draw_number, join, read_number, write_sound, write_video

KEY = "00112233445566778899aabbccddeeff"
ENCRYPTION = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": KEY, "encryption_kid": KEY}


def sample(path: Path, num_frames: int, window: Window | None = None, **options: Any) -> list[Frame]:
    with path.open("rb") as file:
        return sample_frames(file, Sampling(num_frames, **options), window)


def describe(path: Path, num_frames: int) -> VideoInfo:
    with path.open("rb") as file:
        return tile_frames(file, Sampling(num_frames), Tiling(1, 56)).info


def read_numbers(frames: Sequence[Frame]) -> list[int]:
    return [read_number(frame.pixels) for frame in frames]


def test_a_frame_shown_at_several_times_is_given_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "slides.mkv", 3, times_s=[0.0, 0.5, 2.0])
    assert read_numbers(sample(path, 8)) == [0, 1]
    assert read_numbers(sample(path, 8, as_card=True)) == [0, 0, *[1] * 6]
    assert describe(path, 8).repeated_share == 0.75


def test_the_readable_part_of_a_truncated_video_is_taken_on_request(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match="--on-truncated take"):
        sample(path, 5)
    assert read_numbers(sample(path, 5, take_truncated=True)) == [4, 14, 24, 34, 44]
    assert read_numbers(sample(path, 2, Window(1), take_truncated=True)) == [31, 43]
    with pytest.raises(MediaError, match=r"starts at 3 s, the video ends at"):
        sample(path, 2, Window(3), take_truncated=True)


@pytest.mark.parametrize("offset", [0x70000000, 4])
def test_a_damaged_index_does_not_make_a_video_truncated(tmp_path: Path, offset: int) -> None:
    """The second half of the index points beyond the end of the file, or to its first frame."""
    path = write_video(tmp_path / "a.avi", 100, codec="mpeg4")
    data = bytearray(path.read_bytes())
    start = data.rindex(b"idx1") + 8
    for entry in range(start + (len(data) - start) // 32 * 16, len(data), 16):
        struct.pack_into("<I", data, entry + 8, offset)
    path.write_bytes(data)
    assert read_numbers(sample(path, 4)) == [12, 37, 62, 87]
    with path.open("rb") as file:
        assert read_numbers(decode_frames_at(file, [0.0, 3.96])) == [0, 99]


SHIFTS = {"later": 5000, "earlier": -5000}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("first", [1, 50])
def test_an_index_that_points_at_other_frames_is_not_used(tmp_path: Path, shift: int, first: int) -> None:
    """All entries but the first, or the second half of them, point at places inside other frames."""
    path = write_video(tmp_path / "a.avi", 100, codec="mpeg4", key_every=20)
    data = bytearray(path.read_bytes())
    start = data.rindex(b"idx1") + 8
    for entry in range(start + first * 16, len(data), 16):
        (offset,) = struct.unpack_from("<I", data, entry + 8)
        struct.pack_into("<I", data, entry + 8, max(4, offset + shift))
    path.write_bytes(data)
    assert read_numbers(sample(path, 8)) == [6, 18, 31, 43, 56, 68, 81, 93]
    with path.open("rb") as file:
        assert read_numbers(decode_frames_at(file, [2.0, 3.96])) == [50, 99]


STREAMS: dict[str, tuple[list[str], int | None, int]] = {
    "a cover before the film": (["cover", "film"], None, 50),
    "a cover after the film": (["film", "cover"], None, 50),
    "a cover that is the default": (["cover", "film"], 0, 50),
    "the default": (["large", "film"], 1, 50),
    "only a cover": (["cover"], None, 200),
}


@pytest.mark.parametrize("suffix", ["mkv", "mov"])
@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_that_players_show_is_sampled(tmp_path: Path, name: str, suffix: str) -> None:
    sources = {
        "film": write_video(tmp_path / "film.mp4", draw_numbers(range(50, 75), 1)),
        "large": write_video(tmp_path / "large.mp4", draw_numbers(range(100, 125), 2)),
        "cover": write_video(tmp_path / "cover.mov", draw_numbers([200], 4), codec="mjpeg", pixel_format="yuvj420p"),
    }
    names, default, first = STREAMS[name]
    path = join(tmp_path / f"joined.{suffix}", *(sources[name] for name in names), default=default)
    assert read_numbers(sample(path, 25))[0] == first


def draw_numbers(numbers: Sequence[int], scale: int) -> list[np.ndarray]:
    return [np.kron(draw_number(number), np.ones((scale, scale, 1), np.uint8)) for number in numbers]


def test_the_largest_stream_is_sampled_if_none_is_the_default(tmp_path: Path) -> None:
    """Transport streams have no default."""
    film = write_video(tmp_path / "film.mp4", draw_numbers(range(50, 75), 1))
    large = write_video(tmp_path / "large.mp4", draw_numbers(range(100, 125), 2))
    for number, sources in enumerate([(film, large), (large, film)]):
        assert read_numbers(sample(join(tmp_path / f"{number}.ts", *sources), 25))[0] == 100


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 100 numbered frames with noise, whose packets are large, and a key frame every 10."""
    random = np.random.default_rng(0)
    pictures = (np.vstack([draw_number(n), random.integers(0, 256, (64, 256, 3), np.uint8)]) for n in range(100))
    return write_video(tmp_path_factory.mktemp("noisy") / "noisy.mkv", pictures, key_every=10)


def test_the_nearest_intact_frame_replaces_a_corrupt_one(noisy: Path, tmp_path: Path) -> None:
    path = damage_packets(tmp_path / "damaged.mkv", noisy, [30, 31, 32])
    wanted, given = sample(noisy, 50), sample(path, 50)
    intact = {frame.timestamp_s: frame.pixels for frame in sample(noisy, 100)}
    assert len(given) >= 47
    assert {frame.timestamp_s for frame in wanted[:14] + wanted[21:]} <= {frame.timestamp_s for frame in given}
    for frame in given:
        if not 30 <= round(frame.timestamp_s * 25) < 40:  # frames up to the next key frame refer to the corrupt ones
            assert np.array_equal(frame.pixels, intact[frame.timestamp_s])
    assert 0 < describe(path, 50).corrupt_share < 0.2


def test_corrupt_frames_without_intact_ones_near_them_are_left_out(noisy: Path, tmp_path: Path) -> None:
    path = damage_packets(tmp_path / "half.mkv", noisy, range(60, 100))
    frames = sample(path, 10)
    assert 6 <= len(frames) < 9
    assert frames[-1].timestamp_s < 3.5


def test_a_video_of_corrupt_frames_is_an_error(noisy: Path, tmp_path: Path) -> None:
    path = damage_packets(tmp_path / "all.mkv", noisy, range(3, 100))
    with pytest.raises(MediaError, match=r"frames are corrupt \(\d of 10\), and no intact frame is near them"):
        sample(path, 10)


@pytest.mark.parametrize("options", [{}, {"movflags": "frag_keyframe+empty_moov"}])
def test_an_encrypted_video_is_an_error(tmp_path: Path, options: dict[str, str]) -> None:
    path = write_video(tmp_path / "encrypted.mp4", 50, options=ENCRYPTION | options)
    with pytest.raises(MediaError, match="the video is encrypted"):
        sample(path, 10)


def test_an_encrypted_video_without_information_about_its_packets_is_an_error(noisy: Path, tmp_path: Path) -> None:
    """The boxes that describe the encryption are renamed, so that the decoder gets encrypted packets."""
    path = write_video(tmp_path / "encrypted.mp4", sample_pixels(noisy), options=ENCRYPTION)
    data = path.read_bytes()
    for box in (b"senc", b"saio", b"saiz", b"tenc"):
        data = data.replace(box, b"free")
    path.write_bytes(data)
    with pytest.raises(MediaError, match="the video is encrypted"):
        sample(path, 10)


def sample_pixels(path: Path) -> list[np.ndarray]:
    return [frame.pixels for frame in sample(path, 50)]


def test_an_encrypted_soundtrack_does_not_matter(tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "sound.mp4", 2, options=ENCRYPTION)
    path = join(tmp_path / "joined.mp4", write_video(tmp_path / "film.mp4", 50), sound)
    assert len(sample(path, 2)) == 2
