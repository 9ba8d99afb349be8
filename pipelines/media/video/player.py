"""Show the frame of a video that a player shows at a time, and skip the frames between the wanted ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import av
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines.errors import MediaError
from pipelines.media.video.container import NotReadable, read_fps
from pipelines.media.video.source import ENCRYPTED, VideoSource

_BLIND_SEEK_S = 10  # without an index, frames nearer than this are reached by decoding instead of seeking
_LOST_SHARE, _LOST_S = 0.1, 1.0  # of the stated duration; headers of complete files are wrong by up to this much
_SLACK_S = 0.002  # containers round times, some of them to milliseconds


class Truncated(MediaError):  # noqa: N818  (the name says what happened)
    """The frames end at `end_s`, long before the time that the header states."""

    def __init__(self, end_s: float, stated_s: float) -> None:
        super().__init__(
            f"the video ends at {end_s:.1f} s, its header says {stated_s:.1f} s: it is truncated, or its header "
            f"is wrong; --on-truncated take uses the part that is readable"
        )
        self.end_s = end_s


class DamagedIndex(MediaError):  # noqa: N818
    """Frames follow where the index ends; from now on the video is read in order."""

    def __init__(self) -> None:
        super().__init__("the index of the video is damaged")


class FrameStream:
    """The frames of a source from its position on, in the order of time; the last one taken may be put back.

    Frames before `skip_before_s` are skipped if no other frame refers to them. `failed_s` is the time of the last
    packet that could not be decoded.
    """

    def __init__(self, source: VideoSource) -> None:
        self._source, self.skip_before_s = source, -math.inf
        self._waiting: VideoFrame | None = None
        self.restart()

    def restart(self) -> None:
        """Decode from the position of the source, which has moved."""
        self.failed_s = -math.inf
        self._frames, self._waiting = self._decode(), None

    def close(self) -> None:
        """Free the frames at once: in a cycle with the generator they would outlive many other videos."""
        self._frames, self._waiting = iter(()), None

    def take(self) -> VideoFrame | None:
        """Return the next frame, None at the end."""
        frame, self._waiting = self._waiting or next(self._frames, None), None
        return frame

    def put_back(self, frame: VideoFrame | None) -> None:
        """Let `take` return this frame again."""
        self._waiting = frame

    def _decode(self) -> Iterator[VideoFrame]:
        """Yield frames; skip packets that cannot be decoded, as ffmpeg does. Raise MediaError for an encrypted one."""
        previous, source, stream = -math.inf, self._source, self._source.stream
        for packet in source.read_packets():
            is_early = packet.pts is not None and source.get_time_s(packet) < self.skip_before_s
            stream.codec_context.skip_frame = "NONREF" if is_early else "DEFAULT"
            if packet.has_sidedata("encryption_info"):
                raise MediaError(ENCRYPTED)
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except (av.FFmpegError, EOFError):
                self.failed_s = max(self.failed_s, source.get_time_s(packet))
                continue
            for frame in frames:
                if frame.pts is None:
                    _set_time(frame, stream, previous)
                if frame.pts > previous:
                    previous = frame.pts
                    yield frame


def _set_time(frame: VideoFrame, stream: VideoStream, previous: float) -> None:
    """Set the time of a frame of a bare stream, which stores none."""
    step = 1 / read_fps(stream) / float(stream.time_base or 1)
    frame.time_base = stream.time_base
    frame.pts = 0 if previous == -math.inf else round(previous + step)


class Player:
    """Shows the frames of a source at ascending times; methods raise MediaError.

    `frames` are those after the one that is shown; `intact` is the last one passed that is not corrupt.
    """

    def __init__(self, source: VideoSource) -> None:
        self._source, self.frames = source, FrameStream(source)
        self._may_seek, self._may_skip = source.is_seekable, True
        self._reset()

    def close(self) -> None:
        """Free the frames."""
        self.frames.close()
        self._reset()

    def start_over(self) -> None:
        """Go back to the start of the video."""
        self.close()
        self._source.start_over()
        self.frames.restart()

    def _reset(self) -> None:
        self.shown: VideoFrame | None = None
        self.intact: VideoFrame | None = None

    def show(self, time_s: float) -> VideoFrame:
        """Return the frame that a player shows at this time: the last one started by then.

        Raise DamagedIndex if the video has to be played again from its start, Truncated if it ends too early.
        """
        shown = self._play_until(time_s)
        if self._source.get_time_s(shown) < self.frames.skip_before_s:
            # A skipped frame may have started later than `shown`, as in videos with long-lasting frames.
            self._may_skip = False
            self.start_over()
            shown = self._play_until(time_s)
        return shown

    def show_next(self, before_s: float) -> VideoFrame | None:
        """Return the frame after the shown one; None if it starts at `before_s` or later, or at the end."""
        frame = self.frames.take()
        if frame is None:
            self._get_last(min(before_s, self._source.duration_s))  # raises if it is not the end
            return None
        if self._source.get_time_s(frame) >= before_s:
            self.frames.put_back(frame)
            return None
        self._pass(frame)
        return frame

    def is_stale(self, time_s: float, reach_s: float) -> bool:
        """Return whether the shown frame is much older than `time_s` because later packets cannot be decoded."""
        shown_s = self._source.get_time_s(self.shown)
        return shown_s < min(self.frames.failed_s, time_s - reach_s)

    def _play_until(self, time_s: float) -> VideoFrame:
        self.frames.skip_before_s = time_s - 2 / self._source.fps if self._may_skip else -math.inf
        self._seek_if_worthwhile(time_s)
        slack_s = min(_SLACK_S, 0.5 / self._source.fps)
        while self.shown is None or self._source.get_time_s(self.shown) <= time_s - slack_s:
            candidate = self.frames.take()
            if candidate is None:
                return self._get_last(time_s)
            if self.shown is not None and self._source.get_time_s(candidate) > time_s + slack_s:
                self.frames.put_back(candidate)
                break
            self._pass(candidate)
        return self.shown

    def _pass(self, frame: VideoFrame | None) -> None:
        self.shown = frame
        if frame is not None and not frame.is_corrupt:
            self.intact = frame

    def _get_last(self, time_s: float) -> VideoFrame:
        """Return the last frame. Raise MediaError if the video ends earlier than a header is usually wrong by."""
        source, last = self._source, self.shown
        stated_s = source.read_stated_end_s()
        end_s = -math.inf if last is None else max(source.get_time_s(last), self.frames.failed_s) + 1 / source.fps
        is_cut = min(time_s, stated_s) - end_s > max(_LOST_S, _LOST_SHARE * stated_s)
        if is_cut and self._continues_in_order(end_s):
            raise DamagedIndex
        if last is None:
            source.raise_if_encrypted()
            raise NotReadable("no frame of the video can be decoded")
        if is_cut:
            raise Truncated(end_s, stated_s)
        return last

    def _continues_in_order(self, end_s: float) -> bool:
        """Return whether the file goes on when it is read in order, as its index may be damaged; then start over."""
        continues = self._source.read_in_order(end_s)
        self._may_seek &= self._source.is_seekable
        if not continues:
            return False
        self._reset()
        self.frames.restart()
        return True

    def _seek_if_worthwhile(self, time_s: float) -> None:
        """Seek towards `time_s` if that saves decoding frames."""
        current_s = self._source.get_time_s(self.shown) if self.shown else 0.0
        key_s = self._source.index.find_key_frame_s(time_s)
        is_worth_it = time_s - current_s > _BLIND_SEEK_S if key_s is None else key_s > current_s
        if self._may_seek and is_worth_it:
            if not self._source.index.is_sound_at(time_s):
                self._may_seek = self._source.is_seekable = False
                self.start_over()
                return
            self._seek(time_s)
            # If it led back, never seek again: without key frames each seek would decode the whole video.
            self._may_seek &= self.shown is not None and self._source.get_time_s(self.shown) > current_s

    def _seek(self, time_s: float) -> None:
        """Seek to a key frame at or before `time_s`."""
        for back_s in (0, 1, 10, 100):
            if time_s <= back_s or not self._source.seek(time_s - back_s):
                break
            self.frames.restart()
            self._pass(self.frames.take())
            if self.shown is not None and self._source.get_time_s(self.shown) <= time_s + _SLACK_S:
                return
        self.start_over()
