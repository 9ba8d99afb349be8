"""Choose the frames of a benchmark's videos, and the subtitles shown with them, as VLMEvalKit does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_UNBOUNDED_S = 100_000.0


@dataclass(frozen=True)
class FrameRule:
    """How many frames a video is shown as: `num_frames`, or `fps` per second if it is given."""

    num_frames: int
    fps: float | None = None


def spread_evenly(num_frames: int, count: int) -> list[int]:
    """Return `count` frame indices inside the video, without its first frame (Video-MME, MLVU, TempCompass)."""
    step = num_frames / (count + 1)
    return [int(number * step) for number in range(1, count + 1)]


def take_per_second(num_frames: int, video_fps: float, fps: float) -> list[int]:
    """Return the indices of `fps` frames per second, from the first one on."""
    step = video_fps / fps
    return [int(number * step) for number in range(int(num_frames / video_fps * fps))]


def split_in_segments(
    last_frame: int,
    count: int,
    video_fps: float = 1.0,
    bounds_s: tuple[float, float] | None = None,
    first_frame: int = 0,
) -> list[int]:
    """Return the middle of each of `count` equal parts of the video or of `bounds_s` in it (MVBench)."""
    start_s, end_s = bounds_s or (-_UNBOUNDED_S, _UNBOUNDED_S)
    start = max(first_frame, round(start_s * video_fps))
    length = float(min(round(end_s * video_fps), last_frame) - start) / count
    return [int(start + length / 2 + round(length * number)) for number in range(count)]


def select_subtitles(text: str, frames: Sequence[int], video_fps: float) -> str:
    """Return the text of the first subtitle during each frame, a line each; a frame without one adds none.

    text: the content of an SRT file. Needs the extra `eval`. Raise ValueError if it cannot be read.
    """
    try:
        import pysubs2
    except ImportError as error:
        raise ValueError(f"{error}; subtitles need pip install 'ovis2-ray[eval]'") from error
    try:
        subtitles = pysubs2.SSAFile.from_string(text)
    except (ValueError, pysubs2.exceptions.Pysubs2Error) as error:
        raise ValueError(f"these are no subtitles: {error}") from error
    times_ms = [pysubs2.make_time(frames=frame, fps=video_fps) for frame in frames]
    texts = [_find_text(subtitles, time_ms) for time_ms in times_ms]
    return "\n".join(text for text in texts if text.strip())


def _find_text(subtitles: Iterable[Any], time_ms: int) -> str:
    shown = (line.text for line in subtitles if line.start < time_ms < line.end)
    return str(next(shown, "")).replace("\\N", " ")
