"""Videos are decoded in a separate process: limits, crashes, cleanup, and the memory of very long videos."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovis_model.inputs.tiling import tile_image
from pipelines.errors import MediaError
from pipelines.media.reference import VideoLocation, Window
from pipelines.media.video.frames import Tiling
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.sampling import Sampling, read_duration_s, sample_frames
from tests.support.roots import ROOT
from tests.support.videos import find_clip, read_number, write_repeated, write_video


@pytest.fixture
def decoder() -> Iterator[VideoDecoder]:
    decoder = VideoDecoder()
    yield decoder
    decoder.close()


def get_pid(decoder: VideoDecoder) -> int:
    assert decoder._process is not None
    return decoder._process.pid


def read_peak_bytes(decoder: VideoDecoder) -> int:
    status = Path(f"/proc/{get_pid(decoder)}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match
    return int(match[1]) << 10


def read_cpu_s(decoder: VideoDecoder) -> float:
    fields = Path(f"/proc/{get_pid(decoder)}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_frames_equal_those_decoded_in_this_process(decoder: VideoDecoder, tmp_path: Path) -> None:
    path = find_clip("bikes.mp4")
    with path.open("rb") as file:
        expected = sample_frames(file, Sampling(6), Window(1, 9))
    data = path.read_bytes()
    shard = tmp_path / "shard.tar"
    shard.write_bytes(bytes(1000) + data + bytes(77))
    places = [
        VideoLocation(str(path)),
        VideoLocation(str(shard), 1000, len(data)),
        VideoLocation("anywhere", data=data),
    ]
    for place in places:
        frames = decoder.sample_frames(place, Sampling(6), Window(1, 9))
        assert [f.timestamp_s for f in frames] == [f.timestamp_s for f in expected]
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(frames, expected, strict=True))
        again = decoder.decode_frames_at(place, [f.timestamp_s for f in frames[:2]])
        assert np.array_equal(again[1].pixels, expected[1].pixels)


def test_the_process_survives_unreadable_and_undecodable_files(decoder: VideoDecoder, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        decoder.sample_frames(VideoLocation(str(tmp_path / "gone.mp4")), Sampling(3))
    first = get_pid(decoder)
    with pytest.raises(MediaError, match="not a video"):
        decoder.sample_frames(VideoLocation("", data=b"nothing"), Sampling(3))
    with pytest.raises(MediaError, match="not a video"):
        decoder.sample_frames(VideoLocation(str(find_clip("bikes.mp4")), 1 << 40, 100), Sampling(3))
    assert len(decoder.sample_frames(VideoLocation(str(find_clip("bikes.mp4"))), Sampling(3))) == 3
    assert get_pid(decoder) == first


def test_a_video_that_takes_too_long_is_an_error_and_the_next_one_is_decoded(decoder: VideoDecoder) -> None:
    decoder._timeout_s = 0.4
    slow = VideoLocation(str(find_clip("bigbuckbunny.mp4")))
    started_s = time.monotonic()
    with pytest.raises(MediaError, match=r"longer than 0\.4 s"):
        decoder.sample_frames(slow, Sampling(10_000), size=(1600, 1600))
    assert time.monotonic() - started_s < 60
    decoder._timeout_s = 60
    assert len(decoder.sample_frames(slow, Sampling(2))) == 2


def test_memory_is_limited(tmp_path: Path) -> None:
    decoder = VideoDecoder(max_memory_bytes=700 << 20)
    with pytest.raises(MediaError, match="more memory"):
        decoder.sample_frames(VideoLocation(str(find_clip("bikes.mp4"))), Sampling(200), size=(2000, 2000))
    assert len(decoder.sample_frames(VideoLocation(str(find_clip("bikes.mp4"))), Sampling(12))) == 12
    decoder.close()


def read_resident_bytes(decoder: VideoDecoder) -> int:
    pages = int(Path(f"/proc/{get_pid(decoder)}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_memory_does_not_depend_on_earlier_videos(decoder: VideoDecoder, tmp_path: Path) -> None:
    """Each codec of 4K that outlived its video took 25 MB."""
    place = VideoLocation(str(write_video(tmp_path / "4k.mp4", np.zeros((3, 2160, 3840, 3), np.uint8))))
    residents = []
    for _ in range(13):
        decoder.tile_frames(place, Sampling(2), Tiling(1, 56))
        residents.append(read_resident_bytes(decoder))
    assert residents[-1] < 1.2 * residents[2]


def test_a_process_out_of_memory_is_replaced_and_the_video_is_tried_again(decoder: VideoDecoder) -> None:
    place = VideoLocation(str(find_clip("bikes.mp4")))
    decoder.read_frame_times(place)
    first = get_pid(decoder)
    resource.prlimit(first, resource.RLIMIT_AS, (read_resident_bytes(decoder), decoder._max_memory_bytes))
    assert len(decoder.sample_frames(place, Sampling(12))) == 12
    assert get_pid(decoder) != first


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_tiles_equal_those_of_full_frames(decoder: VideoDecoder, tmp_path: Path, max_tiles: int) -> None:
    path = write_video(tmp_path / "turned.mp4", find_frames("bikes.mp4", 5), rotation=90)
    place = VideoLocation(str(path))
    full = decoder.sample_frames(place, Sampling(5))
    for wanted in (Sampling(5), [frame.timestamp_s for frame in full]):
        clip = decoder.tile_frames(place, wanted, Tiling(max_tiles, 112))
        assert [frame.timestamp_s for frame in clip.frames] == [frame.timestamp_s for frame in full]
        for frame, whole in zip(clip.frames, full, strict=True):
            tiles, sizes = tile_image(Image.fromarray(whole.pixels), max_tiles, 112)
            assert (frame.height, frame.width) == whole.pixels.shape[:2]
            assert np.array_equal(frame.tiles, tiles)
            assert np.array_equal(frame.sizes, sizes)
    assert (clip.info.width, clip.info.height, clip.info.codec) == (frame.width, frame.height, "h264")
    assert clip.info.num_bytes == path.stat().st_size


def find_frames(name: str, count: int) -> list[np.ndarray]:
    with find_clip(name).open("rb") as file:
        return [frame.pixels for frame in sample_frames(file, Sampling(count))]


def test_frames_reach_this_process_as_tiles(decoder: VideoDecoder) -> None:
    """The frames of 1280 x 720 px take 33 MB, their tiles 7 MB."""
    place = VideoLocation(str(find_clip("bigbuckbunny.mp4")))
    tracemalloc.start()
    clip = decoder.tile_frames(place, Sampling(12), Tiling(1, 448))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(clip.frames) == 12
    assert peak_bytes < 10e6


def test_a_process_that_died_is_replaced(decoder: VideoDecoder) -> None:
    place = VideoLocation(str(find_clip("carphone_pristine.mp4")))
    decoder.sample_frames(place, Sampling(2))
    os.kill(get_pid(decoder), signal.SIGKILL)
    assert len(decoder.sample_frames(place, Sampling(2))) == 2


def test_a_video_that_kills_its_process_is_an_error(decoder: VideoDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is retried once, in case the process was killed for another reason."""
    monkeypatch.setattr("pipelines.media.video.process.sys.executable", "/bin/false")
    with pytest.raises(MediaError, match=r"crashed twice on this video \(exit code 1\)"):
        decoder.sample_frames(VideoLocation(str(find_clip("carphone_pristine.mp4"))), Sampling(2))


def test_damaged_videos_give_frames_or_a_reason(decoder: VideoDecoder, tmp_path: Path) -> None:
    """Bytes are changed and removed, also in headers: the process survives, and the error states a reason."""
    chance = random.Random(0)
    kinds = {"a.mp4": "libx264", "a.mkv": "libx264", "a.avi": "mpeg4", "a.ts": "mpeg2video", "a.webm": "libvpx"}
    whole = [write_video(tmp_path / name, 30, codec=codec).read_bytes() for name, codec in kinds.items()]
    reasons = []
    for _ in range(200):
        damaged = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 10, 100))):
            damaged[chance.randrange(chance.choice((1500, len(damaged))))] = chance.randrange(256)
        if chance.random() < 0.3:
            start = chance.randrange(len(damaged))
            del damaged[start : start + 500]
        try:
            assert decoder.sample_frames(VideoLocation("", data=bytes(damaged)), Sampling(5))
        except MediaError as error:
            reasons.append(str(error))
    assert 20 < len(reasons) < 180
    assert not [reason for reason in reasons if re.match(r"\w+Error|the decoder died", reason)]


def test_the_process_ends_with_its_parent() -> None:
    program = (
        "import os, sys\n"
        "from pipelines.media.video.process import *\n"
        "decoder = VideoDecoder()\n"
        f"decoder.read_frame_times(VideoLocation({str(find_clip('bikes.mp4'))!r}))\n"
        "print(decoder._process.pid, flush=True)\n"
        f"slow = VideoLocation({str(find_clip('bigbuckbunny.mp4'))!r})\n"
        "decoder.sample_frames(slow, Sampling(10_000), size=(3000, 3000))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline_s = time.monotonic() + 60
    while is_alive(child):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize(("suffix", "fps", "times"), [("mp4", 2, 144), ("mkv", 25, 200)])
def test_very_long_videos_take_bounded_time_and_memory(tmp_path: Path, suffix: str, fps: int, times: int) -> None:
    """Ten hours or 100,000 frames take less than 1 GB and the time of a short video with as many sampled frames."""
    source = write_video(tmp_path / "source.mp4", 500, fps=fps)
    path = write_repeated(tmp_path / f"long.{suffix}", source, times)
    decoder = VideoDecoder()
    with path.open("rb") as file:
        assert read_duration_s(file) == pytest.approx(500 * times / fps)
    decoder.sample_frames(VideoLocation(str(source)), Sampling(1))  # starts the process
    seconds = []
    for place in (VideoLocation(str(source)), VideoLocation(str(path))):
        before_s = read_cpu_s(decoder)
        frames = decoder.sample_frames(place, Sampling(128))
        seconds.append(read_cpu_s(decoder) - before_s)
    middle = [(n + 0.5) * 500 * times / 128 for n in range(128)]
    assert [read_number(frame.pixels) for frame in frames] == [int(number) % 500 for number in middle]
    assert read_peak_bytes(decoder) < 1 << 30
    assert seconds[1] < 10 * seconds[0] + 0.5
    decoder.close()
