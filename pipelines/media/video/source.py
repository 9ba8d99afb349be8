"""Hold a video file open at the stream that players show: packets, times, seeking, and what its header states."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import av
from av.video.stream import VideoStream

from pipelines.errors import MediaError
from pipelines.media.video.container import (
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
from pipelines.media.video.frames import VideoInfo
from pipelines.media.video.seek_index import SeekIndex

ENCRYPTED = "the video is encrypted; decrypt it first"


class FrameTimes(NamedTuple):
    """The time of each frame in seconds, ascending, and the average number of frames per second."""

    times_s: list[float]
    fps: float


class VideoSource:
    """An open video, as a context manager; methods raise MediaError.

    stream, index: the stream that players show, and its index.
    fps, duration_s: the values that ffmpeg prints.
    is_seekable: whether the file is read with its index.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._number, self.is_seekable = file, -1, file.seekable()
        self.open()
        if not self.index.is_sound():
            self.is_seekable = False
            self.start_over()
        self.fps = read_fps(self.stream)
        self.duration_s = self._read_duration_s()

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self) -> None:
        """Open the file at its start."""
        self._container = open_container(self._file, seekable=self.is_seekable)
        if self._number < 0:
            self._number = self._choose_stream()
        self.stream: VideoStream = self._container.streams[self._number]  # type: ignore[assignment]
        # Other cores decode other videos, and threads cost a quarter more CPU.
        self.stream.codec_context.thread_type = "NONE"
        self._start_s = (self._container.start_time or 0) / av.time_base
        self.index = SeekIndex(self._file, self._container, self.stream, self._start_s)

    def _choose_stream(self) -> int:
        try:
            return choose_stream(self._file, self._container)
        except MediaError:
            self._container.close()
            raise

    def close(self) -> None:
        """Free the codec and the file's buffers."""
        self._container.close()
        del self.stream, self.index

    def start_over(self) -> None:
        """Open the file again, as some formats cannot seek to their start."""
        self.close()
        self.open()

    def read_packets(self) -> Iterator[Any]:
        """Yield the packets of the stream from here on; see the function of this name."""
        return read_packets(self._container, self.stream)

    def get_time_s(self, timed: Any) -> float:
        """Return the time of a frame or packet, in seconds from the start of the video."""
        return float((timed.pts or 0) * (timed.time_base or 0)) - self._start_s

    def seek(self, time_s: float) -> bool:
        """Go to a key frame near `time_s`, with or without an index; return whether the file allows it."""
        try:
            self._container.seek(round((time_s + self._start_s) * av.time_base))
        except av.FFmpegError:
            return False
        return True

    def read_in_order(self, end_s: float) -> bool:
        """Read the file without its index from now on, and return whether it goes on after `end_s`.

        The samples of an MP4 cannot be found without its index, so it stays as it is.
        """
        if not self.is_seekable or self._container.format.name == MP4:
            return False
        self.is_seekable = False
        try:
            return self._measure_end_s() > max(end_s, 0.0) + 1 / self.fps
        except NotReadable:
            self.is_seekable = True
            self.open()
            return False

    def read_stated_end_s(self) -> float:
        """Return the stated end of the frames in seconds, or of the whole file if the stream states none."""
        stated_s = read_stated_end_s(self.stream)
        return self.duration_s if stated_s is None else stated_s

    def read_frame_times(self) -> FrameTimes:
        """Return the time at which each frame is shown, in order, without decoding."""
        times_s = [self.get_time_s(packet) for packet in self.read_packets() if packet.size]
        return FrameTimes(sorted(times_s), float(self.stream.average_rate or self.fps))

    def raise_if_encrypted(self) -> None:
        """Raise MediaError if the header says that the video is encrypted."""
        if has_encrypted_video(self._file, self._container, self.stream):
            raise MediaError(ENCRYPTED)

    def describe(self, width: int, height: int, *, repeated_share: float, corrupt_share: float) -> VideoInfo:
        """Return facts about the video, whose frames are shown with this size in px."""
        return VideoInfo(
            width=width,
            height=height,
            format=name_container(self._container),
            num_bytes=self._file.seek(0, io.SEEK_END),
            duration_s=self.duration_s,
            fps=round(self.fps, 3),
            codec=self.stream.codec_context.name,
            repeated_share=repeated_share,
            corrupt_share=corrupt_share,
        )

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
        for packet in self.read_packets():
            count += packet.size > 0
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        length_s = max(end_s - self._start_s, count / self.fps)
        self.start_over()
        return length_s
