"""Pick a frame of a video for each wanted time, an intact one where the frame of that time is corrupt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from av.video.frame import VideoFrame

from pipelines.errors import MediaError
from pipelines.media.video.frames import Frame, VideoInfo, convert_to_pixels
from pipelines.media.video.player import Player
from pipelines.media.video.source import VideoSource


class FramePicker:
    """Picks frames of one source, and counts those that are repeated, corrupt, or lost without a replacement."""

    def __init__(self, source: VideoSource) -> None:
        self._source, self._player = source, Player(source)
        self.num_wanted = self.num_repeated = self.num_corrupt = self.num_lost = 0

    def close(self) -> None:
        """Free the frames."""
        self._player.close()

    def start_over(self) -> None:
        """Go back to the start of the video."""
        self._player.start_over()

    def pick(self, times_s: Sequence[float], reach_s: float = math.inf) -> Iterator[VideoFrame | None]:
        """Yield the frame that a player shows at each of these ascending times.

        In place of a corrupt frame yield the nearest intact one within `reach_s`, None if there is none.
        """
        self.num_wanted, self.num_repeated, self.num_corrupt, self.num_lost = len(times_s), 0, 0, 0
        for time_s in times_s:
            shown = self._player.show(time_s)
            is_good = not shown.is_corrupt and not self._player.is_stale(time_s, reach_s)
            yield shown if is_good else self._replace(time_s, reach_s)

    def pick_intact(self, times_s: Sequence[float]) -> Iterator[VideoFrame]:
        """Yield one frame for each of these ascending times. Raise MediaError if every frame is corrupt."""
        for frame in self.pick(times_s):
            if frame is None:
                raise MediaError("every frame of the video is corrupt")
            yield frame

    def convert(self, frame: VideoFrame, size: tuple[int, int] | None = None) -> Frame:
        """Convert a frame to pixels, resized to `size` (width_px, height_px) if given."""
        return Frame(convert_to_pixels(frame, size), max(0.0, self._source.get_time_s(frame)))

    def describe(self, width: int, height: int) -> VideoInfo:
        """Return facts about the video, whose frames are shown with this size in px, and about the picked frames."""
        count = max(1, self.num_wanted)
        shares = {"repeated_share": self.num_repeated / count, "corrupt_share": self.num_corrupt / count}
        return self._source.describe(width, height, **shares)

    def _replace(self, time_s: float, reach_s: float) -> VideoFrame | None:
        """Return the intact frame nearest to `time_s`, None if none is within `reach_s`."""
        self._source.raise_if_encrypted()
        self.num_corrupt += 1
        near = [frame for frame in (self._player.intact, self._find_next_intact(time_s + reach_s)) if frame is not None]
        best = min(near, key=lambda frame: self._measure_distance_s(frame, time_s), default=None)
        if best is None or self._measure_distance_s(best, time_s) > reach_s:
            self.num_lost += 1
            return None
        return best

    def _find_next_intact(self, until_s: float) -> VideoFrame | None:
        """Return the first intact frame after the shown one and up to `until_s`, None if there is none."""
        frames = self._player.frames
        frame = frames.take()
        while frame is not None and frame.is_corrupt and self._source.get_time_s(frame) <= until_s:
            frame = frames.take()
        frames.put_back(frame)
        return None if frame is None or frame.is_corrupt else frame

    def _measure_distance_s(self, frame: VideoFrame, time_s: float) -> float:
        return abs(self._source.get_time_s(frame) - time_s)
