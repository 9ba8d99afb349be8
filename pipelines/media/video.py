"""Decode a few frames of a video and skip the frames between them.

This module knows nothing of rows, processes and limits: `video_process` runs it in a process that can be killed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from ovis_model.inputs.keyframes import select_uniform
from pipelines.errors import MediaError
from pipelines.media.frames import Frame, TiledVideo, Tiling, VideoInfo, check_size, convert_to_pixels, tile_frame
from pipelines.media.reference import Window

# Demuxers that read one file. Playlists (hls, dash, concat) would open other files, by name or over the network.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,flv,live_flv,mpeg,mpegts,mpegvideo,asf,ogg,rm,wtv,dv,mxf,nut,ivf,h264,hevc,av1,obu,"
    "m4v,h263,vc1,gif,y4m,yuv4mpegpipe,3gp,swf,nsv,smjpeg,mjpeg"
)
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv")
_BLIND_SEEK_S = 10  # without an index, frames nearer than this are reached by decoding instead of seeking
_LOST_SHARE, _LOST_S = 0.1, 1.0  # of the stated duration; headers of complete files are wrong by up to this much
_SLACK_S = 0.002  # containers round times, some of them to milliseconds
_BUFFER_BYTES = 1 << 16

# ISO media except images in it (AVIF, HEIC), Matroska, AVI, FLV, ASF, Ogg, MPEG program and transport streams, MXF.
_SIGNATURES = re.compile(
    rb"....(ftyp(?!avi[fs]|hei[cmsx]|mif1|msf1)|moov|moof|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|OggS|\0\0\x01[\xba\xb3]|\x47.{187}\x47|\x06\x0e\x2b\x34",
    re.DOTALL,
)


@dataclass(frozen=True)
class Sampling:
    """Evenly spread frames: at most `num_frames`, and at most `fps` per second."""

    num_frames: int
    fps: float | None = None


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
    in the card's code. Raise MediaError if the frames cannot be decoded.
    """
    with _Video(file) as video:
        return list(video.decode_frames_at(_choose_times(video, sampling, window or Window()), size))


def tile_frames(
    file: BinaryIO, wanted: Sampling | Sequence[float], tiling: Tiling, window: Window | None = None
) -> TiledVideo:
    """Return the frames of `sample_frames` or `decode_frames_at` as tiles; only one frame at a time is in full size."""
    with _Video(file) as video:
        times_s = _choose_times(video, wanted, window or Window()) if isinstance(wanted, Sampling) else wanted
        frames = [tile_frame(frame, tiling) for frame in video.decode_frames_at(times_s, None)]
        return TiledVideo(frames, video.describe(frames[0].width, frames[0].height))


def decode_frames_at(file: BinaryIO, times_s: Sequence[float]) -> list[Frame]:
    """Return the frames that a player shows at these ascending times, in full size.

    Raise MediaError if they cannot be decoded.
    """
    with _Video(file) as video:
        return list(video.decode_frames_at(times_s, None))


def iterate_frames(file: BinaryIO, window: Window, size: tuple[int, int]) -> Iterator[Frame]:
    """Yield every frame of the window in the order of time, as stored, resized to `size` (width_px, height_px).

    Raise MediaError if they cannot be decoded, or if the video ends long before its header says.
    """
    with _Video(file) as video:
        yield from video.iterate_frames(window, size)


def has_video_signature(data: bytes) -> bool:
    """Return whether the first bytes are those of a video, which `decode_image` cannot read."""
    return _SIGNATURES.match(data) is not None


def read_duration_s(file: BinaryIO) -> float:
    """Return the duration stated in the header, or measured from the packets. Raise MediaError if it is not a video."""
    with _Video(file) as video:
        return video.duration_s


def read_frame_times(file: BinaryIO) -> FrameTimes:
    """Return the time at which each frame is shown, in order, without decoding. Raise MediaError if it is no video."""
    with _Video(file) as video:
        return video.read_frame_times()


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


class _Video:
    """One file whose frames are read in the order of time, as a context manager; methods raise MediaError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._may_seek = self._may_skip = True
        self._wanted_from_s = -math.inf
        self._open()
        self.fps = _read_fps(self._stream)
        self.duration_s = self._read_duration_s()

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def decode_frames_at(self, times_s: Sequence[float], size: tuple[int, int] | None) -> Iterator[Frame]:
        """Yield the frame that a player shows at each of these ascending times: the last one started by then."""
        for time_s in times_s:
            shown = self._decode_at(time_s)
            if self._get_time_s(shown) < self._wanted_from_s:
                # A skipped frame may have started later than `shown`, as in videos with long-lasting frames.
                self._may_skip = False
                self._start_over()
                shown = self._decode_at(time_s)
            yield Frame(convert_to_pixels(shown, size), max(0.0, self._get_time_s(shown)))

    def read_frame_times(self) -> FrameTimes:
        """Return the time of each frame; see the function of this name."""
        times_s = [self._get_time_s(packet) for packet in _read_packets(self._container, self._stream) if packet.size]
        return FrameTimes(sorted(times_s), float(self._stream.average_rate or self.fps))

    def describe(self, width: int, height: int) -> VideoInfo:
        """Return facts about the video, whose frames are shown with this size in px."""
        format_, codec = self._container.format.name.partition(",")[0], self._stream.codec_context.name
        return VideoInfo(
            width, height, format_, self._file.seek(0, io.SEEK_END), self.duration_s, round(self.fps, 3), codec
        )

    def _open(self) -> None:
        self._container = _open(self._file)
        try:
            self._stream = _find_stream(self._container)
        except MediaError:
            self._container.close()
            raise
        # Other cores decode other videos, and threads cost a quarter more CPU.
        self._stream.codec_context.thread_type = "NONE"
        self._start_s = (self._container.start_time or 0) / av.time_base
        self._frames = self._decode_frames()
        self._shown: VideoFrame | None = None  # the last frame passed
        self._next: VideoFrame | None = None  # decoded already, but later than the wanted time

    def _close(self) -> None:
        """Free the codec and its frames at once: in a cycle with `_frames` they would outlive many other videos."""
        self._frames, self._shown, self._next = iter(()), None, None
        self._container.close()
        del self._stream

    def _start_over(self) -> None:
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
            self._shown = candidate
        return self._shown

    def _get_last(self, time_s: float) -> VideoFrame:
        """Return the last frame. Raise MediaError if the video ends earlier than a header is usually wrong by."""
        if self._shown is None:
            raise MediaError("no frame of the video can be decoded")
        end_s, stated_s = self._get_time_s(self._shown) + 1 / self.fps, self._read_end_s()
        if min(time_s, stated_s) - end_s > max(_LOST_S, _LOST_SHARE * stated_s):
            raise MediaError(
                f"the video ends at {end_s:.1f} s, its header says {stated_s:.1f} s: it is truncated, or its header "
                f"is wrong; append #t=0,{end_s:.1f} to its name to use the part that is readable"
            )
        return self._shown

    def _read_end_s(self) -> float:
        """Return the stated end of the frames, in seconds; the sound may be longer."""
        if self._stream.duration is not None:
            return float(self._stream.duration * (self._stream.time_base or 0))
        if match := re.match(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self._stream.metadata.get("DURATION", "")):  # Matroska
            return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
        return self.duration_s

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
        if base is None or self._container.format.name not in _INDEXED or len(index) < 2:
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
            self._shown = next(self._frames, None)
            if self._shown is not None and self._get_time_s(self._shown) <= time_s + _SLACK_S:
                return
        self._start_over()

    def _decode_frames(self) -> Iterator[VideoFrame]:
        """Yield frames in the order of time; skip packets that cannot be decoded, as ffmpeg does.

        Before `_wanted_from_s`, frames that no other frame refers to are skipped too.
        """
        previous = -math.inf
        for packet in _read_packets(self._container, self._stream):
            is_early = packet.pts is not None and self._get_time_s(packet) < self._wanted_from_s
            self._stream.codec_context.skip_frame = "NONREF" if is_early else "DEFAULT"
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except (av.FFmpegError, EOFError):
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
        """Return the duration in seconds, rounded to hundredths as ffmpeg prints it."""
        microseconds = self._container.duration or 0
        if microseconds <= 0:
            microseconds = self._measure_duration()
        return (microseconds + 5000) // 10_000 / 100

    def _measure_duration(self) -> int:
        """Measure the duration up to the end of the last packet, in microseconds, without decoding."""
        end_s, count = 0.0, 0
        for packet in _read_packets(self._container, self._stream):
            count += packet.size > 0
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        length_s = max(end_s - self._start_s, count / self.fps)
        self._start_over()
        return round(length_s * av.time_base)


def _open(file: BinaryIO) -> InputContainer:
    if not file.seek(0, io.SEEK_END):
        raise MediaError("not a video: the file is empty")
    file.seek(0)
    try:
        options = {"format_whitelist": _FORMATS}
        return av.open(file, "r", buffer_size=_BUFFER_BYTES, options=options, metadata_errors="replace")
    except MemoryError:
        raise
    except av.FFmpegError as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise MediaError(f"not a video, or its header is damaged: {reason}") from error


def _find_stream(container: InputContainer) -> VideoStream:
    """Return the first video stream that is not the cover image of a song. Raise MediaError without one."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise MediaError(f"no video in the file: it holds {kinds}")
    context: Any = streams[0].codec_context
    if context is None:
        raise MediaError("the video's codec is unknown, or its header is damaged")
    check_size(context.width, context.height)
    return streams[0]


def _read_fps(stream: VideoStream) -> float:
    """Return frames per second as ffmpeg prints them (two decimals) and moviepy reads them (29.97 is 30000 / 1001)."""
    rate = float(stream.average_rate or stream.guessed_rate or stream.base_rate or 0)
    stated = round(rate, 2)
    if stated <= 0:
        return rate if rate > 0 else 1.0
    for whole in (23, 24, 25, 30, 50):
        if stated != whole and abs(stated - whole * 1000 / 1001) < 0.01:
            return whole * 1000 / 1001
    return stated


def _read_packets(container: InputContainer, stream: VideoStream) -> Iterator[Any]:
    """Yield packets up to the end of the file, or to the first that cannot be read."""
    try:
        yield from container.demux(stream)
    except MemoryError:  # av's is an FFmpegError too
        raise
    except av.FFmpegError:
        return


def _set_time(frame: VideoFrame, stream: VideoStream, previous: float) -> None:
    """Set the time of a frame of a bare stream, which stores none."""
    step = 1 / _read_fps(stream) / float(stream.time_base or 1)
    frame.time_base = stream.time_base
    frame.pts = 0 if previous == -math.inf else round(previous + step)
