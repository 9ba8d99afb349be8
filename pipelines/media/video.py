"""Decode a few frames of a video and skip the frames between them.

This module knows nothing of rows, processes and limits: `video_process` runs it in a process that can be killed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeVar

import av
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from ovis_model.inputs.keyframes import select_uniform
from pipelines.errors import MediaError
from pipelines.media.frames import Frame, TiledVideo, Tiling, VideoInfo, convert_to_pixels, tile_frame
from pipelines.media.reference import Window
from pipelines.media.video_file import (
    INDEXED,
    MP4,
    NotReadable,
    choose_stream,
    has_encrypted_video,
    name_container,
    open_container,
    read_fps,
    read_packets,
    read_stated_end_s,
)

_BLIND_SEEK_S = 10  # without an index, frames nearer than this are reached by decoding instead of seeking
_LOST_SHARE, _LOST_S = 0.1, 1.0  # of the stated duration; headers of complete files are wrong by up to this much
_MIN_REACH_S = 1.0  # an intact frame within this or within its part of the video replaces a corrupt one
_ENCRYPTED = "the video is encrypted; decrypt it first"
_SLACK_S = 0.002  # containers round times, some of them to milliseconds

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


class FrameTimes(NamedTuple):
    """The time of each frame in seconds, ascending, and the average number of frames per second."""

    times_s: list[float]
    fps: float


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
    with _Video(file) as video:
        return _decode(video, sampling, window or Window(), lambda frame: video.convert(frame, size))


def decode_frames_at(file: BinaryIO, times_s: Sequence[float]) -> list[Frame]:
    """Return the frames that a player shows at these ascending times, in full size; for a corrupt one the nearest.

    Raise MediaError if they cannot be decoded.
    """
    with _Video(file) as video:
        return _decode(video, times_s, Window(), video.convert)


def tile_frames(
    file: BinaryIO, wanted: Sampling | Sequence[float], tiling: Tiling, window: Window | None = None
) -> TiledVideo:
    """Return the frames of `sample_frames` or `decode_frames_at` as tiles; only one frame at a time is in full size."""
    with _Video(file) as video:
        frames = _decode(video, wanted, window or Window(), lambda frame: tile_frame(video.convert(frame), tiling))
        return TiledVideo(frames, video.describe(frames[0].width, frames[0].height))


def iterate_frames(file: BinaryIO, window: Window, size: tuple[int, int]) -> Iterator[Frame]:
    """Yield every frame of the window in the order of time, as stored, resized to `size` (width_px, height_px).

    Raise MediaError if they cannot be decoded, or if the video ends long before its header says.
    """
    with _Video(file) as video:
        yield from video.iterate_frames(window, size)


def read_duration_s(file: BinaryIO) -> float:
    """Return the duration stated in the header, or measured from the packets. Raise MediaError if it is not a video."""
    with _Video(file) as video:
        return video.duration_s


def read_frame_times(file: BinaryIO) -> FrameTimes:
    """Return the time at which each frame is shown, in order, without decoding. Raise MediaError if it is no video."""
    with _Video(file) as video:
        return video.read_frame_times()


def _decode(
    video: _Video, wanted: Sampling | Sequence[float], window: Window, convert: Callable[[VideoFrame], T]
) -> list[T]:
    """Return the wanted frames, converted; of a truncated video those of its readable part, if allowed."""
    try:
        return _take(video, wanted, window, convert)
    except _DamagedIndex:
        return _decode(video, wanted, window, convert)
    except Truncated as error:
        if not (isinstance(wanted, Sampling) and wanted.take_truncated):
            raise
        video.start_over()
        return _take(video, wanted, Window(window.start_s, min(window.stop_s, error.end_s)), convert)


def _take(
    video: _Video, wanted: Sampling | Sequence[float], window: Window, convert: Callable[[VideoFrame], T]
) -> list[T]:
    if isinstance(wanted, Sampling):
        return _take_sample(video, wanted, window, convert)
    return [convert(frame) for frame in video.decode_intact_frames_at(wanted)]


def _take_sample(video: _Video, sampling: Sampling, window: Window, convert: Callable[[VideoFrame], T]) -> list[T]:
    times_s = _choose_times(video, sampling, window)
    part_s = (min(window.stop_s, video.duration_s) - window.start_s) / len(times_s)
    taken: list[T] = []
    last_pts, video.num_repeated = None, 0
    for frame in video.decode_frames_at(times_s, max(_MIN_REACH_S, part_s / 2)):
        if frame is None:
            continue
        is_repeated = last_pts is not None and frame.pts == last_pts
        last_pts = frame.pts
        video.num_repeated += is_repeated
        if sampling.as_card or not is_repeated:
            taken.append(convert(frame))
    if video.num_lost * 2 > len(times_s):
        raise MediaError(f"{video.num_lost} of {len(times_s)} frames are corrupt, and no intact frame is near them")
    return taken


def _choose_times(video: _Video, sampling: Sampling, window: Window) -> list[float]:
    stop_s = min(window.stop_s, video.duration_s)
    if not window.start_s < stop_s and window.start_s > 0:
        raise MediaError(f"the window starts at {window.start_s:g} s, the video ends at {video.duration_s:g} s")
    length_s = stop_s - window.start_s
    count = max(1, int(video.fps * length_s))
    wanted = sampling.num_frames
    if sampling.fps is not None:
        wanted = min(wanted, max(1, math.ceil(length_s * sampling.fps)))
    return [window.start_s + int(index) / video.fps for index in select_uniform(count, wanted)]


class Truncated(MediaError):  # noqa: N818  (the name says what happened)
    """The frames end at `end_s`, long before the time that the header states."""

    def __init__(self, end_s: float, stated_s: float) -> None:
        super().__init__(
            f"the video ends at {end_s:.1f} s, its header says {stated_s:.1f} s: it is truncated, or its header "
            f"is wrong; --on-truncated take uses the part that is readable"
        )
        self.end_s = end_s


class _DamagedIndex(MediaError):  # noqa: N818
    """Frames follow where the index ends; from now on the video is read in order."""

    def __init__(self) -> None:
        super().__init__("the index of the video is damaged")


class _Video:
    """One file whose frames are read in the order of time, as a context manager; methods raise MediaError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._index = file, -1
        self._may_seek = self._may_skip = self._is_seekable = True
        self._wanted_from_s = -math.inf
        self.num_wanted = self.num_repeated = self.num_corrupt = self.num_lost = 0
        self._open()
        self.fps = read_fps(self._stream)
        self.duration_s = self._read_duration_s()

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def decode_frames_at(self, times_s: Sequence[float], reach_s: float = math.inf) -> Iterator[VideoFrame | None]:
        """Yield the frame that a player shows at each of these ascending times: the last one started by then.

        In place of a corrupt frame yield the nearest intact one within `reach_s`, None if there is none.
        """
        self.num_wanted, self.num_corrupt, self.num_lost = len(times_s), 0, 0
        for time_s in times_s:
            shown = self._decode_at(time_s)
            if self._get_time_s(shown) < self._wanted_from_s:
                # A skipped frame may have started later than `shown`, as in videos with long-lasting frames.
                self._may_skip = False
                self.start_over()
                shown = self._decode_at(time_s)
            yield self._replace_corrupt(shown, time_s, reach_s)

    def decode_intact_frames_at(self, times_s: Sequence[float]) -> Iterator[VideoFrame]:
        """Yield one frame for each of these ascending times. Raise MediaError if every frame is corrupt."""
        for frame in self.decode_frames_at(times_s):
            if frame is None:
                raise MediaError("every frame of the video is corrupt")
            yield frame

    def convert(self, frame: VideoFrame, size: tuple[int, int] | None = None) -> Frame:
        """Convert a frame to pixels, resized to `size` (width_px, height_px) if given."""
        return Frame(convert_to_pixels(frame, size), max(0.0, self._get_time_s(frame)))

    def read_frame_times(self) -> FrameTimes:
        """Return the time of each frame; see the function of this name."""
        times_s = [self._get_time_s(packet) for packet in read_packets(self._container, self._stream) if packet.size]
        return FrameTimes(sorted(times_s), float(self._stream.average_rate or self.fps))

    def describe(self, width: int, height: int) -> VideoInfo:
        """Return facts about the video, whose frames are shown with this size in px."""
        return VideoInfo(
            width=width,
            height=height,
            format=name_container(self._container),
            num_bytes=self._file.seek(0, io.SEEK_END),
            duration_s=self.duration_s,
            fps=round(self.fps, 3),
            codec=self._stream.codec_context.name,
            repeated_share=self.num_repeated / max(1, self.num_wanted),
            corrupt_share=self.num_corrupt / max(1, self.num_wanted),
        )

    def _open(self) -> None:
        self._container = open_container(self._file, seekable=self._is_seekable)
        if self._index < 0:
            self._index = self._choose_stream()
        self._stream: VideoStream = self._container.streams[self._index]  # type: ignore[assignment]
        # Other cores decode other videos, and threads cost a quarter more CPU.
        self._stream.codec_context.thread_type = "NONE"
        self._start_s = (self._container.start_time or 0) / av.time_base
        self._failed_s = -math.inf  # time of the last packet that could not be decoded
        self._frames = self._decode_frames()
        self._shown: VideoFrame | None = None  # the last frame passed
        self._intact: VideoFrame | None = None  # the last one passed that is not corrupt
        self._next: VideoFrame | None = None  # decoded already, but later than the wanted time

    def _choose_stream(self) -> int:
        try:
            return choose_stream(self._file, self._container)
        except MediaError:
            self._container.close()
            raise

    def _close(self) -> None:
        """Free the codec and its frames at once: in a cycle with `_frames` they would outlive many other videos."""
        self._frames, self._shown, self._intact, self._next = iter(()), None, None, None
        self._container.close()
        del self._stream

    def start_over(self) -> None:
        """Open the file again, as some formats cannot seek to their start."""
        self._close()
        self._open()

    def iterate_frames(self, window: Window, size: tuple[int, int]) -> Iterator[Frame]:
        """Yield the frames that a player shows during the window."""
        frame: VideoFrame | None = self._decode_at(window.start_s)
        resizer = VideoReformatter()  # one for all frames: to make it costs more than to resize a frame
        while frame is not None and self._get_time_s(frame) < window.stop_s:
            self._shown = frame
            small = resizer.reformat(frame, *size, format="rgb24", interpolation="AREA")
            yield Frame(small.to_ndarray(), max(window.start_s, self._get_time_s(frame)))  # type: ignore[arg-type]
            frame, self._next = self._next or next(self._frames, None), None
        if frame is None:
            self._get_last(min(window.stop_s, self.duration_s))

    def _replace_corrupt(self, shown: VideoFrame, time_s: float, reach_s: float) -> VideoFrame | None:
        """Return `shown` unless it is corrupt, else the nearest intact frame within `reach_s`, or None.

        A frame that was shown long ago is left out too if the packets since then could not be decoded.
        """
        is_stale = self._get_time_s(shown) < min(self._failed_s, time_s - reach_s)
        if not shown.is_corrupt and not is_stale:
            return shown
        self._raise_if_encrypted()
        self.num_corrupt += 1
        near = [frame for frame in (self._intact, self._find_next_intact(time_s + reach_s)) if frame is not None]
        best = min(near, key=lambda frame: self._measure_distance_s(frame, time_s), default=None)
        if best is None or self._measure_distance_s(best, time_s) > reach_s:
            self.num_lost += 1
            return None
        return best

    def _raise_if_encrypted(self) -> None:
        if has_encrypted_video(self._file, self._container, self._stream):
            raise MediaError(_ENCRYPTED)

    def _measure_distance_s(self, frame: VideoFrame, time_s: float) -> float:
        return abs(self._get_time_s(frame) - time_s)

    def _find_next_intact(self, until_s: float) -> VideoFrame | None:
        """Return the first intact frame after the wanted time and up to `until_s`, None if there is none."""
        frame = self._next or next(self._frames, None)
        while frame is not None and frame.is_corrupt and self._get_time_s(frame) <= until_s:
            frame = next(self._frames, None)
        self._next = frame
        return None if frame is None or frame.is_corrupt else frame

    def _decode_at(self, time_s: float) -> VideoFrame:
        """Decode up to the frame that a player shows at `time_s`, and return it.

        Raise MediaError if there is no such frame.
        """
        self._wanted_from_s = time_s - 2 / self.fps if self._may_skip else -math.inf
        self._seek_if_worthwhile(time_s)
        slack_s = min(_SLACK_S, 0.5 / self.fps)
        while self._shown is None or self._get_time_s(self._shown) <= time_s - slack_s:
            candidate, self._next = self._next or next(self._frames, None), None
            if candidate is None:
                return self._get_last(time_s)
            if self._shown is not None and self._get_time_s(candidate) > time_s + slack_s:
                self._next = candidate
                break
            self._pass(candidate)
        assert self._shown is not None
        return self._shown

    def _pass(self, frame: VideoFrame | None) -> None:
        self._shown = frame
        if frame is not None and not frame.is_corrupt:
            self._intact = frame

    def _get_last(self, time_s: float) -> VideoFrame:
        """Return the last frame. Raise MediaError if the video ends earlier than a header is usually wrong by."""
        last, stated_s = self._shown, read_stated_end_s(self._stream)
        stated_s = self.duration_s if stated_s is None else stated_s
        end_s = -math.inf if last is None else max(self._get_time_s(last), self._failed_s) + 1 / self.fps
        is_cut = min(time_s, stated_s) - end_s > max(_LOST_S, _LOST_SHARE * stated_s)
        if is_cut and self._is_seekable and self._continues_unseekable(end_s):
            raise _DamagedIndex
        if last is None:
            self._raise_if_encrypted()
            raise NotReadable("no frame of the video can be decoded")
        if is_cut:
            raise Truncated(end_s, stated_s)
        return last

    def _continues_unseekable(self, end_s: float) -> bool:
        """Open the file again to be read in order, as its index may be damaged.

        Return whether it goes on after `end_s`. The samples of an MP4 cannot be found without its index.
        """
        if self._container.format.name == MP4:
            return False
        self._is_seekable = self._may_seek = False
        try:
            return self._measure_end_s() > max(end_s, 0.0) + 1 / self.fps
        except NotReadable:
            self._is_seekable = True
            self._open()
            return False

    def _seek_if_worthwhile(self, time_s: float) -> None:
        """Seek towards `time_s` if that saves decoding frames."""
        current_s = self._get_time_s(self._shown) if self._shown else 0.0
        key_s = self._find_key_frame(time_s)
        is_worth_it = time_s - current_s > _BLIND_SEEK_S if key_s is None else key_s > current_s
        if self._may_seek and is_worth_it:
            self._seek(time_s)
            # If it led back, never seek again: without key frames each seek would decode the whole video.
            self._may_seek &= self._shown is not None and self._get_time_s(self._shown) > current_s

    def _find_key_frame(self, time_s: float) -> float | None:
        """Return the time of the key frame before `time_s` in the index, None if the index does not reach so far.

        Index entries are decoding times, which are a little early.
        """
        index, base = self._stream.index_entries, self._stream.time_base
        if base is None or self._container.format.name not in INDEXED or len(index) < 2:
            return None
        wanted = round((time_s + self._start_s) / base)
        if index[len(index) - 1].timestamp < wanted:
            return None
        entry = index.search_timestamp(wanted)
        return None if entry < 0 else float(index[entry].timestamp * base) - self._start_s

    def _seek(self, time_s: float) -> None:
        """Seek to a key frame at or before `time_s`, with or without an index."""
        for back_s in (0, 1, 10, 100):
            if time_s <= back_s:
                break
            try:
                self._container.seek(round((time_s - back_s + self._start_s) * av.time_base))
            except av.FFmpegError:
                break
            self._frames, self._next = self._decode_frames(), None
            self._pass(next(self._frames, None))
            if self._shown is not None and self._get_time_s(self._shown) <= time_s + _SLACK_S:
                return
        self.start_over()

    def _decode_frames(self) -> Iterator[VideoFrame]:
        """Yield frames in the order of time; skip packets that cannot be decoded, as ffmpeg does.

        Before `_wanted_from_s`, frames that no other frame refers to are skipped too. Raise MediaError for a packet
        that is encrypted.
        """
        previous = self._failed_s = -math.inf
        for packet in read_packets(self._container, self._stream):
            is_early = packet.pts is not None and self._get_time_s(packet) < self._wanted_from_s
            self._stream.codec_context.skip_frame = "NONREF" if is_early else "DEFAULT"
            if packet.has_sidedata("encryption_info"):
                raise MediaError(_ENCRYPTED)
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except (av.FFmpegError, EOFError):
                self._failed_s = max(self._failed_s, self._get_time_s(packet))
                continue
            for frame in frames:
                if frame.pts is None:
                    _set_time(frame, self._stream, previous)
                if frame.pts > previous:
                    previous = frame.pts
                    yield frame

    def _get_time_s(self, timed: Any) -> float:
        """Return the time of a frame or packet, in seconds from the start of the video."""
        return float((timed.pts or 0) * (timed.time_base or 0)) - self._start_s

    def _read_duration_s(self) -> float:
        """Return the duration in seconds, rounded to hundredths as ffmpeg prints it; measure it if none is stated."""
        microseconds = self._container.duration or 0
        if microseconds <= 0:
            microseconds = round(self._measure_end_s() * av.time_base)
        return (microseconds + 5000) // 10_000 / 100

    def _measure_end_s(self) -> float:
        """Return the end of the last packet in seconds, without decoding; then start over."""
        end_s, count = 0.0, 0
        self.start_over()
        for packet in read_packets(self._container, self._stream):
            count += packet.size > 0
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        length_s = max(end_s - self._start_s, count / self.fps)
        self.start_over()
        return length_s


def _set_time(frame: VideoFrame, stream: VideoStream, previous: float) -> None:
    """Set the time of a frame of a bare stream, which stores none."""
    step = 1 / read_fps(stream) / float(stream.time_base or 1)
    frame.time_base = stream.time_base
    frame.pts = 0 if previous == -math.inf else round(previous + step)
