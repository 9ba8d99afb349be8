"""Hold a video file open at the stream that players show: packets, times, seeking, and what its header states."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import av
from av.video.stream import VideoStream

from pipelines.errors import MediaError
from pipelines.media.video.container import (
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
from pipelines.media.video.frames import VideoInfo

ENCRYPTED = "the video is encrypted; decrypt it first"


class FrameTimes(NamedTuple):
    """The time of each frame in seconds, ascending, and the average number of frames per second."""

    times_s: list[float]
    fps: float


class VideoSource:
    """An open video, as a context manager; methods raise MediaError.

    `stream` is the one that players show; `fps` and `duration_s` are the values that ffmpeg prints. `is_seekable` tells
    whether the file is read with its index.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._index, self.is_seekable = file, -1, True
        self.open()
        if not all(map(self._is_sound, (0, 1, len(self.stream.index_entries) - 1))):
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
        if self._index < 0:
            self._index = self._choose_stream()
        self.stream: VideoStream = self._container.streams[self._index]  # type: ignore[assignment]
        # Other cores decode other videos, and threads cost a quarter more CPU.
        self.stream.codec_context.thread_type = "NONE"
        self._start_s = (self._container.start_time or 0) / av.time_base

    def _choose_stream(self) -> int:
        try:
            return choose_stream(self._file, self._container)
        except MediaError:
            self._container.close()
            raise

    def close(self) -> None:
        """Free the codec and the file's buffers."""
        self._container.close()
        del self.stream

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

    def find_key_frame_s(self, time_s: float) -> float | None:
        """Return the time of the key frame before `time_s` in the index, None if the index does not reach so far.

        Index entries are decoding times, which are a little early.
        """
        index, base = self.stream.index_entries, self.stream.time_base
        if base is None or self._container.format.name not in INDEXED or len(index) < 2:
            return None
        wanted = round((time_s + self._start_s) / base)
        if index[len(index) - 1].timestamp < wanted:
            return None
        entry = index.search_timestamp(wanted)
        return None if entry < 0 else float(index[entry].timestamp * base) - self._start_s

    def has_sound_index(self, time_s: float) -> bool:
        """Return whether the index entry to seek to for `time_s` points at a frame of the size that it states."""
        base = self.stream.time_base or 1
        return self._is_sound(self.stream.index_entries.search_timestamp(round((time_s + self._start_s) / base)))

    def _is_sound(self, number: int) -> bool:
        """Return whether an entry of the index points at a frame of the size that it states.

        Only an AVI has an index apart from what it describes and without a check: ffmpeg jumps to any place that an
        entry names, and counts the frames from there by the entry's number.
        """
        index = self.stream.index_entries
        if self._container.format.name != "avi" or not 0 <= number < len(index):
            return True
        name, num_bytes = struct.unpack("<4sI", self._peek(index[number].pos, 8))
        return bool(name[:2] == b"%02d" % self.stream.index and num_bytes == index[number].size)

    def _peek(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes of the file, zeros beyond its end, without moving the place where the demuxer reads on."""
        place = self._file.tell()
        self._file.seek(offset)
        data = self._file.read(num_bytes)
        self._file.seek(place)
        return data.ljust(num_bytes, b"\0")

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
