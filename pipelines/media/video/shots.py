"""Find the times at which to cut a video: where its content changes at once, or every so many seconds.

The content of two frames is compared by the mean difference of their hue, saturation and value, as PySceneDetect's
ContentDetector does, but on thumbnails. A cut is a large difference, or a smaller one that stands out from its
neighbours, as in PySceneDetect's AdaptiveDetector.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import MediaError
from pipelines.media.reference import Window
from pipelines.media.video.frames import Frame, Pixels
from pipelines.media.video.sampling import iterate_frames, read_duration_s

MAX_CUTS = 100_000  # per video; a header that implies more is wrong
_THUMBNAIL_PX = (64, 36)  # width and height: smaller ones miss cuts between similar shots, larger ones find no more
_ALWAYS, _PROMINENT = 27.0, 15.0  # mean difference of hue (0 to 180), saturation and value (0 to 255)
_TIMES_NEIGHBOURS, _NEIGHBOURS = 3.0, 2  # a prominent difference is so many times the mean of two before and after it


@dataclass(frozen=True)
class Cutting:
    """Where videos are cut: at shots that last `min_shot_s` at least, into windows of `window_s`, or both."""

    at_shots: bool = False
    min_shot_s: float = 0.6
    window_s: float | None = None


def find_cuts(file: BinaryIO, cutting: Cutting, window: Window) -> list[float]:
    """Return the ascending times in seconds, all inside the window, at which to cut the video.

    Raise MediaError if the video cannot be decoded or has more than MAX_CUTS.
    """
    stop_s = min(window.stop_s, read_duration_s(file))
    cuts_s: list[float] = []
    if cutting.at_shots:
        frames = iterate_frames(file, window, _THUMBNAIL_PX)
        cuts_s = drop_short_shots(find_shots(frames), window.start_s, stop_s, cutting.min_shot_s)
    if cutting.window_s is not None:
        cuts_s = _add_windows(cuts_s, cutting.window_s, window.start_s, stop_s)
    return [round(cut_s, 3) for cut_s in cuts_s]  # as ids state them


def find_shots(frames: Iterable[Frame]) -> Iterator[float]:
    """Yield the time of the first frame of every shot but the first; few frames are in memory at a time."""
    recent: deque[tuple[float, float]] = deque([(0.0, 0.0)] * (_NEIGHBOURS + 1), maxlen=2 * _NEIGHBOURS + 1)
    previous: NDArray[np.float32] | None = None
    for pixels, time_s in frames:
        colours = _to_hsv(pixels)
        recent.append((0.0 if previous is None else _compare(colours, previous), time_s))
        previous = colours
        if len(recent) == recent.maxlen and _is_cut([score for score, _ in recent]):
            yield recent[_NEIGHBOURS][1]
    for _ in range(_NEIGHBOURS):
        recent.append((0.0, math.inf))
        if len(recent) == recent.maxlen and _is_cut([score for score, _ in recent]):
            yield recent[_NEIGHBOURS][1]


def _is_cut(scores: Sequence[float]) -> bool:
    """Return whether the score in the middle is that of a cut."""
    score = scores[_NEIGHBOURS]
    others = (sum(scores) - score) / (len(scores) - 1)
    return score >= _ALWAYS or (score >= _PROMINENT and score >= _TIMES_NEIGHBOURS * others)


def _compare(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the mean difference of two results of `_to_hsv`; hues are compared around their circle."""
    difference = np.abs(one - other)
    difference[0] = np.minimum(difference[0], 180 - difference[0])
    return float(difference.mean())


def _to_hsv(pixels: Pixels) -> NDArray[np.float32]:
    """Convert uint8[H, W, 3] to float32[3, H, W]: hue from 0 to 180, saturation and value from 0 to 255."""
    red, green, blue = pixels.astype(np.float32).transpose(2, 0, 1)
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.maximum(spread, 1)  # of grey pixels the numerators are 0
    hue = np.where(
        value == red,
        (green - blue) / divisor % 6,
        np.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    saturation = spread / np.maximum(value, 1) * 255
    return np.stack([hue * 30 * (spread > 0), saturation, value])


def drop_short_shots(cuts_s: Iterable[float], start_s: float, stop_s: float, min_shot_s: float) -> list[float]:
    """Return the cuts without those that make a shot shorter than `min_shot_s`: it is joined to the next, or the last.

    Raise MediaError for more than MAX_CUTS.
    """
    kept: list[float] = []
    for cut_s in cuts_s:
        if cut_s - (kept[-1] if kept else start_s) >= min_shot_s:
            kept.append(cut_s)
            _check_count(len(kept))
    while kept and stop_s - kept[-1] < min_shot_s:
        kept.pop()
    return kept


def _add_windows(cuts_s: list[float], window_s: float, start_s: float, stop_s: float) -> list[float]:
    """Return the cuts with those that divide longer parts into windows; the last of a part is 0.5 to 1.5 as long."""
    found: list[float] = []
    for first_s, last_s in zip([start_s, *cuts_s], [*cuts_s, stop_s], strict=True):
        count = max(1, round((last_s - first_s) / window_s))
        _check_count(len(found) + count)
        found += [first_s + number * window_s for number in range(count)]
    return found[1:]


def _check_count(count: int) -> None:
    if count > MAX_CUTS:
        raise MediaError(f"the video would be cut into more than {MAX_CUTS:,} parts; is its header wrong?")
