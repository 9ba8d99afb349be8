"""Decode every picture and clip of the installed packages twice, and compare: pixels are equal, or the reason is.

    python -m tests.stress.media_corpus [PATH...]

Without a PATH, all files of the environment are tried that have the suffix of an image or a video. Images are decoded
with new memory filled in two ways; videos, four frames each, by two processes. Prints each outcome with its number and
an example, and exits with 1 if two tries differ, or if a reason is the text of an exception.
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipelines.errors import MediaError
from pipelines.media.image_formats.fresh_memory import fill_new_memory
from pipelines.media.images import read_image
from pipelines.media.reference import VIDEO_SUFFIXES, VideoLocation
from pipelines.media.video.process import VideoDecoder
from pipelines.media.video.sampling import Sampling
from pipelines.monitoring.error_reasons import normalize_reason
from pipelines.sources.kinds import IMAGE_SUFFIXES

MAX_BYTES = 64 << 20
_EXCEPTION = re.compile(r"^\w+(Error|Exception|Warning)\b|Traceback|object at 0x")

Outcome = tuple[str, bytes]
"""What happened ("ok JPEG", or the reason), and the pixels."""


def main(roots: Sequence[Path]) -> None:
    started_s = time.process_time()
    counts: dict[str, list[Path]] = defaultdict(list)
    faults = list[str]()
    decoders = VideoDecoder(), VideoDecoder()
    for path in find_media(roots):
        tries = (
            decode_video_twice(path, decoders) if path.suffix.lower() in VIDEO_SUFFIXES else decode_image_twice(path)
        )
        counts[tries[0][0]].append(path)
        if tries[0] != tries[1]:
            faults.append(f"{path}: two tries differ ({tries[0][0]}; {tries[1][0]})")
        if _EXCEPTION.search(tries[0][0]):
            faults.append(f"{path}: {tries[0][0]}")
    for decoder in decoders:
        decoder.close()
    for outcome, paths in sorted(counts.items(), key=lambda item: -len(item[1])):
        print(f"{len(paths):6} {outcome}; such as {paths[0].name}")
    print(*faults, sep="\n", end="\n" if faults else "")
    files = sum(map(len, counts.values()))
    print(f"{files} files twice, {len(faults)} faults, {time.process_time() - started_s:.0f} s of CPU for the images")
    sys.exit(bool(faults))


def find_media(roots: Sequence[Path]) -> Iterator[Path]:
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            # A module in TypeScript has the suffix of a transport stream.
            is_text = path.suffix == ".ts" and path.is_file() and b"\0" not in path.read_bytes()[:4096]
            if path.suffix.lower() in suffixes and path.is_file() and not is_text and path.stat().st_size <= MAX_BYTES:
                yield path


def decode_image_twice(path: Path) -> tuple[Outcome, Outcome]:
    data = path.read_bytes()
    with fill_new_memory(0x55):
        one = decode_image(data)
    with fill_new_memory(0xAA):
        return one, decode_image(data)


def decode_image(data: bytes) -> Outcome:
    try:
        image = read_image(data)
    except MediaError as error:
        return normalize_reason("image", str(error)), b""
    return f"ok {image.format}", image.pixels.tobytes()


def decode_video_twice(path: Path, decoders: tuple[VideoDecoder, VideoDecoder]) -> tuple[Outcome, Outcome]:
    return decode_video(path, decoders[0]), decode_video(path, decoders[1])


def decode_video(path: Path, decoder: VideoDecoder) -> Outcome:
    try:
        frames = decoder.sample_frames(VideoLocation(str(path)), Sampling(4))
    except (MediaError, OSError) as error:
        return normalize_reason("video", str(error)), b""
    return f"ok {path.suffix}", b"".join(np.ascontiguousarray(frame.pixels).tobytes() for frame in frames)


if __name__ == "__main__":
    main([*map(Path, sys.argv[1:])] or [Path(sys.prefix)])
