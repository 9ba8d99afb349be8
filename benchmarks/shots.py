"""Compare the cuts that `--split shots` finds with those of PySceneDetect's ContentDetector, and the CPU time of both.

    pip install scenedetect opencv-python-headless
    python -m benchmarks.shots [CLIP ...]

Without clips, those of the test packages are compared. A cut is the same within two frames. Both sides join shots that
are shorter than 15 frames or 0.6 s, their defaults.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av

from pipelines.media.reference import Window
from pipelines.media.video.shots import Cutting, find_cuts
from tests.support.videos import CLIPS, find_clip

MAX_FRAMES_APART = 2


class Found(NamedTuple):
    """The cuts of a clip in seconds, and the CPU time that it took to find them."""

    cuts_s: list[float]
    cpu_s: float


def main(paths: list[Path]) -> None:
    print("| clip | size | length | cuts there | found here | cuts here | found there | CPU there | CPU here |")
    print("|---|---|---|---|---|---|---|---|---|")
    sums = [0, 0, 0, 0]
    for path in paths:
        theirs, ours = measure(find_theirs, path), measure(find_ours, path)
        fps, described = describe(path)
        found = count_found(theirs.cuts_s, ours.cuts_s, fps), count_found(ours.cuts_s, theirs.cuts_s, fps)
        counts = [len(theirs.cuts_s), found[0], len(ours.cuts_s), found[1]]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
        columns = [path.name, described, *map(str, counts), f"{theirs.cpu_s:.2f} s", f"{ours.cpu_s:.2f} s"]
        print(f"| {' | '.join(columns)} |", flush=True)
    print(f"\nfound here: {100 * sums[1] / sums[0]:.1f} % of {sums[0]}; found there: {100 * sums[3] / sums[2]:.1f} %")


def measure(find: Callable[[Path], list[float]], path: Path) -> Found:
    start_s = time.process_time()
    cuts_s = find(path)
    return Found(cuts_s, time.process_time() - start_s)


def find_ours(path: Path) -> list[float]:
    with path.open("rb") as file:
        return find_cuts(file, Cutting(at_shots=True), Window())


def find_theirs(path: Path) -> list[float]:
    from scenedetect import ContentDetector, detect

    return [start.seconds for start, _ in detect(str(path), ContentDetector())][1:]


def describe(path: Path) -> tuple[float, str]:
    """Return the frames per second of a clip, and its size and length for the table."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(
            stream.average_rate or 25
        ), f"{stream.width} x {stream.height} | {(container.duration or 0) / 1e6:.1f} s"


def count_found(wanted_s: list[float], found_s: list[float], fps: float) -> int:
    """Return how many of the wanted cuts have a found one at most MAX_FRAMES_APART away."""
    limit_s = (MAX_FRAMES_APART + 0.1) / fps
    return sum(any(abs(wanted - found) <= limit_s for found in found_s) for wanted in wanted_s)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [find_clip(name) for name in CLIPS])
