"""Look up key frames in the index of a video file, and check that the index points at frames."""

from __future__ import annotations

import struct
from typing import BinaryIO

from av.container import InputContainer
from av.video.stream import VideoStream

from pipelines.media.video.container import INDEXED


class SeekIndex:
    """The index of one stream of an open file whose times begin at `start_s`."""

    def __init__(self, file: BinaryIO, container: InputContainer, stream: VideoStream, start_s: float) -> None:
        self._file, self._format, self._stream, self._start_s = file, container.format.name, stream, start_s
        self._base = stream.time_base or 1

    def find_key_frame_s(self, time_s: float) -> float | None:
        """Return the time of the key frame before `time_s` in the index, None if the index does not reach so far.

        Index entries are decoding times, which are a little early.
        """
        entries, wanted = self._stream.index_entries, self._to_ticks(time_s)
        if self._format not in INDEXED or len(entries) < 2 or entries[len(entries) - 1].timestamp < wanted:
            return None
        number = entries.search_timestamp(wanted)
        return None if number < 0 else float(entries[number].timestamp * self._base) - self._start_s

    def is_sound(self) -> bool:
        """Return whether the first two entries and the last one point at frames; these lie where the header is read."""
        return all(map(self._points_at_frame, (0, 1, len(self._stream.index_entries) - 1)))

    def is_sound_at(self, time_s: float) -> bool:
        """Return whether the entry to seek to for `time_s` points at a frame."""
        return self._points_at_frame(self._stream.index_entries.search_timestamp(self._to_ticks(time_s)))

    def _to_ticks(self, time_s: float) -> int:
        return round((time_s + self._start_s) / self._base)

    def _points_at_frame(self, number: int) -> bool:
        """Return whether an entry points at a frame of the size that it states.

        Only an AVI has an index apart from what it describes and without a check: ffmpeg jumps to any place that an
        entry names, and counts the frames from there by the entry's number.
        """
        entries = self._stream.index_entries
        if self._format != "avi" or not 0 <= number < len(entries):
            return True
        name, num_bytes = struct.unpack("<4sI", self._peek(entries[number].pos, 8))
        return bool(name[:2] == b"%02d" % self._stream.index and num_bytes == entries[number].size)

    def _peek(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes of the file, zeros beyond its end, without moving the place where the demuxer reads on."""
        place = self._file.tell()
        self._file.seek(offset)
        data = self._file.read(num_bytes)
        self._file.seek(place)
        return data.ljust(num_bytes, b"\0")
