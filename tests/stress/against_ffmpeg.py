"""Compare every frame of drawn and real videos with those of an ffmpeg command: orientation, stream choice and colour.

    python -m tests.stress.against_ffmpeg [--ffmpeg /usr/bin/ffmpeg]

Prints per kind how many frames are equal in every pixel, and the largest difference of the others; exits with 1 if a
kind has another number of frames, or if pixels differ. Two kinds may: ffmpeg carries the error of dithering from one
frame of 10 bits to the next, and the last line of colour of an odd height is scaled in another way.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipelines.media.video.sampling import decode_frames_at, read_frame_times
from tests.support.videos import CLIPS, draw_number, find_clip, join, set_display_matrix, write_video

MAY_DIFFER = {"yuv420p10le bt470bg tv": 8, "cityCC0.mpg": 32}
"""Largest differences of 255."""
NUM_FRAMES = 25
ORIENTATIONS = {
    "upright": (1, 0, 0, 1),
    "90 degrees": (0, 1, -1, 0),
    "180 degrees": (-1, 0, 0, -1),
    "270 degrees": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down and mirrored": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed, other diagonal": (0, -1, -1, 0),
    "all zero": (0, 0, 0, 0),
    "scaled by two": (2, 0, 0, 2),
}
# Pixel format, colour space and range as ffmpeg names them.
COLOURS = [
    *((pixel_format, "bt470bg", "tv") for pixel_format in ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le")),
    *(("yuv420p", space, colour_range) for space in ("bt470bg", "bt709") for colour_range in ("tv", "pc")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffmpeg", default="/usr/bin/ffmpeg")
    args = parser.parse_args()
    version = subprocess.run([args.ffmpeg, "-version"], capture_output=True, text=True, check=True).stdout
    print(version.splitlines()[0])
    print("| kind | frames | equal | largest difference |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        faults = [not compare(name, path, args.ffmpeg) for name, path in list_kinds(Path(place), args.ffmpeg)]
    sys.exit(any(faults))


def compare(name: str, path: Path, ffmpeg: str) -> bool:
    """Print a line about a video; return whether its frames are those of ffmpeg."""
    ours, theirs = read_here(path), read_there(path, ffmpeg)
    if ours.shape != theirs.shape:
        print(f"| {name} | {ours.shape} here, {theirs.shape} there | | |")
        return False
    differences = [int(np.abs(one.astype(np.int16) - other).max()) for one, other in zip(ours, theirs, strict=True)]
    equal, largest = differences.count(0), max(differences)
    print(f"| {name} | {len(ours)} | {equal} | {largest} |", flush=True)
    return largest <= MAY_DIFFER.get(name, 0)


def list_kinds(directory: Path, ffmpeg: str) -> Iterator[tuple[str, Path]]:
    for number, (name, (xx, xy, yx, yy)) in enumerate(ORIENTATIONS.items()):
        path = write_video(directory / f"{number}.mp4", NUM_FRAMES)
        yield name, set_display_matrix(path, (xx, xy, 0, yx, yy, 0, 0, 0, 1))
    yield from list_streams(directory)
    for number, (pixel_format, space, colour_range) in enumerate(COLOURS):
        path = write_video(directory / f"plain{number}.mp4", NUM_FRAMES)
        recoded = directory / f"colour{number}.mkv"
        options = ["-pix_fmt", pixel_format, "-colorspace", space, "-color_range", colour_range, "-c:v", "ffv1"]
        if pixel_format == "yuv420p10le":
            options[-1:] = ["libx265", "-x265-params", "log-level=error"]
        subprocess.run([ffmpeg, "-v", "error", "-y", "-i", path, *options, recoded], check=True)
        yield f"{pixel_format} {space} {colour_range}", recoded
    yield from ((name, find_clip(name)) for name in CLIPS)


def list_streams(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield files with several streams that have one answer: ffmpeg takes the most pixels among the default ones."""
    scale: Callable[[int], list[np.ndarray]] = lambda factor: [  # noqa: E731
        np.kron(draw_number(number), np.ones((factor, factor, 1), np.uint8)) for number in range(NUM_FRAMES)
    ]
    small, large = write_video(directory / "small.mp4", scale(1)), write_video(directory / "large.mp4", scale(2))
    yield "two streams, the large one first", join(directory / "first.mkv", large, small)
    yield "two streams, the large one last", join(directory / "last.mkv", small, large)
    yield "two streams, the small one is the default", join(directory / "default.mkv", large, small, default=1)


def read_here(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        times_s = read_frame_times(file).times_s
        return np.stack([frame.pixels for frame in decode_frames_at(file, times_s)])


def read_there(path: Path, ffmpeg: str) -> np.ndarray:
    """Return uint8[N, H, W, 3]; the size is that of the first frame as a PPM."""
    command = [
        ffmpeg,
        "-v",
        "error",
        "-i",
        str(path),
        "-fps_mode",
        "passthrough",
        "-pix_fmt",
        "rgb24",
        "-c:v",
        "ppm",
        "-f",
        "image2pipe",
        "-",
    ]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    width, height = map(int, data[3:30].split()[:2])
    header = len(f"P6\n{width} {height}\n255\n")
    frames = np.frombuffer(data, np.uint8).reshape(-1, header + width * height * 3)[:, header:]
    return frames.reshape(-1, height, width, 3)


if __name__ == "__main__":
    main()
