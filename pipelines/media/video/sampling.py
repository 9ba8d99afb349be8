"""Decode a few frames of a video, those of a sampling rule or at given times.

This module knows nothing of rows, processes and limits: `process` runs it in a process that can be killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from ovis_model.inputs.keyframes import select_uniform
from pipelines.errors import MediaError
from pipelines.media.reference import Window
from pipelines.media.video.frames import Frame, TiledVideo, Tiling, tile_frame
from pipelines.media.video.picker import FramePicker
from pipelines.media.video.player import DamagedIndex, Player, Truncated
from pipelines.media.video.source import FrameTimes, VideoSource

_MIN_REACH_S = 1.0  # an intact frame within this or within its part of the video replaces a corrupt one

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """Evenly spread frames: at most `num_frames`, and at most `fps` per second.

    as_card: repeat a frame that is shown at several of the times, as the model card does, instead of giving it once.
    take_truncated: use the readable part of a truncated video instead of raising an error.
    """

    num_frames: int
    fps: float | None = None
    as_card: bool = False
    take_truncated: bool = False


def sample_frames(
    file: BinaryIO, sampling: Sampling, window: Window | None = None, size: tuple[int, int] | None = None
) -> list[Frame]:
    """Return evenly spread frames in the order of time, resized to `size` (width_px, height_px) if given.

    Frame numbers are those of the model card: T = int(fps * duration) frames are divided into `num_frames` equal parts,
    and the middle of each is taken; all T if there are no more. fps and duration are the values that ffmpeg prints, as
    in the card's code. In place of a corrupt frame the nearest intact one of its part is taken, or none; a frame that
    is shown at several of the times is given once. Raise MediaError if more than half of the frames are corrupt, or if
    they cannot be decoded.
    """
    with _open(file) as (source, picker):
        return _take(source, picker, sampling, window or Window(), lambda frame: picker.convert(frame, size))


def decode_frames_at(file: BinaryIO, times_s: Sequence[float]) -> list[Frame]:
    """Return the frames that a player shows at these ascending times, in full size; for a corrupt one the nearest.

    Raise MediaError if they cannot be decoded.
    """
    with _open(file) as (source, picker):
        return _take(source, picker, times_s, Window(), picker.convert)


def tile_frames(
    file: BinaryIO, wanted: Sampling | Sequence[float], tiling: Tiling, window: Window | None = None
) -> TiledVideo:
    """Return the frames of `sample_frames` or `decode_frames_at` as tiles; only one frame at a time is in full size."""
    with _open(file) as (source, picker):
        frames = _take(
            source, picker, wanted, window or Window(), lambda frame: tile_frame(picker.convert(frame), tiling)
        )
        return TiledVideo(frames, picker.describe(frames[0].width, frames[0].height))


def iterate_frames(file: BinaryIO, window: Window, size: tuple[int, int]) -> Iterator[Frame]:
    """Yield every frame of the window in the order of time, as stored, resized to `size` (width_px, height_px).

    Raise MediaError if they cannot be decoded, or if the video ends long before its header says.
    """
    resizer = VideoReformatter()  # one for all frames: to make it costs more than to resize a frame
    with VideoSource(file) as source, closing(Player(source)) as player:
        frame: VideoFrame | None = player.show(window.start_s)
        while frame is not None and source.get_time_s(frame) < window.stop_s:
            small = resizer.reformat(frame, *size, format="rgb24", interpolation="AREA")
            yield Frame(small.to_ndarray(), max(window.start_s, source.get_time_s(frame)))  # type: ignore[arg-type]
            frame = player.show_next(window.stop_s)


def read_duration_s(file: BinaryIO) -> float:
    """Return the duration stated in the header, or measured from the packets. Raise MediaError if it is not a video."""
    with VideoSource(file) as source:
        return source.duration_s


def read_frame_times(file: BinaryIO) -> FrameTimes:
    """Return the time at which each frame is shown, in order, without decoding. Raise MediaError if it is no video."""
    with VideoSource(file) as source:
        return source.read_frame_times()


@contextmanager
def _open(file: BinaryIO) -> Iterator[tuple[VideoSource, FramePicker]]:
    with VideoSource(file) as source, closing(FramePicker(source)) as picker:
        yield source, picker


def _take(
    source: VideoSource,
    picker: FramePicker,
    wanted: Sampling | Sequence[float],
    window: Window,
    convert: Callable[[VideoFrame], T],
) -> list[T]:
    """Return the wanted frames, converted; of a truncated video those of its readable part, if allowed."""

    def take(window: Window) -> list[T]:
        if isinstance(wanted, Sampling):
            return _take_sample(source, picker, wanted, window, convert)
        return [convert(frame) for frame in picker.pick_intact(wanted)]

    try:
        return take(window)
    except DamagedIndex:
        return _take(source, picker, wanted, window, convert)
    except Truncated as error:
        if not (isinstance(wanted, Sampling) and wanted.take_truncated):
            raise
        picker.start_over()
        return take(Window(window.start_s, min(window.stop_s, error.end_s)))


def _take_sample(
    source: VideoSource, picker: FramePicker, sampling: Sampling, window: Window, convert: Callable[[VideoFrame], T]
) -> list[T]:
    times_s = _choose_times(source, sampling, window)
    part_s = (min(window.stop_s, source.duration_s) - window.start_s) / len(times_s)
    taken: list[T] = []
    last_pts = None
    for frame in picker.pick(times_s, max(_MIN_REACH_S, part_s / 2)):
        if frame is None:
            continue
        is_repeated = last_pts is not None and frame.pts == last_pts
        last_pts = frame.pts
        picker.num_repeated += is_repeated
        if sampling.as_card or not is_repeated:
            taken.append(convert(frame))
    if picker.num_lost * 2 > len(times_s):
        raise MediaError(f"frames are corrupt ({picker.num_lost} of {len(times_s)}), and no intact frame is near them")
    return taken


def _choose_times(source: VideoSource, sampling: Sampling, window: Window) -> list[float]:
    stop_s = min(window.stop_s, source.duration_s)
    if not window.start_s < stop_s and window.start_s > 0:
        raise MediaError(f"the window starts at {window.start_s:g} s, the video ends at {source.duration_s:g} s")
    length_s = stop_s - window.start_s
    count = max(1, int(source.fps * length_s))
    wanted = sampling.num_frames
    if sampling.fps is not None:
        wanted = min(wanted, max(1, math.ceil(length_s * sampling.fps)))
    return [window.start_s + int(index) / source.fps for index in select_uniform(count, wanted)]
