"""Measure the memory of the preprocessor and of its decoder while videos of large and mixed sizes pass through them.

    python -m benchmarks.video_memory [--large 40] [--small 20] [--frames 12] [--mixed 0]

Drawn clips: `--large` of 8K and `--small` of 256 x 64 px, the small ones last; then `--mixed` of 4K, 1080p and 256 x 64
in turn, in H.264, HEVC and Motion JPEG. They go through the stage Preprocess of this process, as in a job. Prints the
resident memory of both processes after each tenth of the clips and the peak so far, in MiB, and how many rows are ok.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.config import CaptionConfig
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import read_rows
from pipelines.rows import ManifestRow
from tests.support.job_configs import make_job_config
from tests.support.stages import make_stage
from tests.support.videos import WIDTH, draw_number, write_video

UHD8K, UHD4K, HD = (4320, 7680), (2160, 3840), (1080, 1920)
CODECS = (("libx264", "yuv420p"), ("libx265", "yuv420p"), ("mjpeg", "yuvj420p"))


class Memory(NamedTuple):
    """Resident memory of a process now and at its peak, in MiB."""

    now: int
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("large", 40), ("small", 20), ("mixed", 0), ("frames", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place, "clips")
        directory.mkdir()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # whose memory is not counted
            mixed = [(UHD4K, HD, None)[number % 3] for number in range(args.mixed)]
            pool.submit(write_clips, directory, [*[UHD8K] * args.large, *[None] * args.small], args.frames).result()
            pool.submit(write_clips, directory, mixed, args.frames, "mixed").result()
        config = make_job_config([directory], Path(place, "out"), num_frames=args.frames)
        measure(config, args.large + args.small + args.mixed)


def write_clips(directory: Path, sizes: Sequence[tuple[int, int] | None], num_frames: int, name: str = "clip") -> None:
    """Write one clip per size, (height, width) or None for the smallest; equal ones are copies."""
    written: dict[tuple[object, int], Path] = {}
    for number, size in enumerate(sizes):
        kind = (size, number // 3 % len(CODECS) if name == "mixed" else number % 2)
        path = directory / f"{name}-{number:03}.mov"
        if kind in written:
            shutil.copy(written[kind], path)
        else:
            codec, pixel_format = CODECS[kind[1]]
            frames = (enlarge(draw_number(frame), size) for frame in range(num_frames))
            written[kind] = write_video(path, frames, codec=codec, pixel_format=pixel_format, key_every=4)


def enlarge(picture: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    if size is None:
        return picture
    height, width = size
    rows, columns = np.arange(height) * len(picture) // height, np.arange(width) * WIDTH // width
    return picture[rows][:, columns]


def measure(config: CaptionConfig, num_rows: int) -> None:
    print("| rows | decoder MiB | its peak | preprocessor MiB | its peak |\n|---|---|---|---|---|")
    statuses, curve = list[str](), list[int]()
    stage, _ = make_stage(config)
    rows = ManifestRow.from_table(read_rows(config.output, RowRange(0, num_rows)))
    for number, (manifest_row, images) in enumerate(stage._fetch_ahead(rows), 1):
        row = stage._prepare(manifest_row, images)
        statuses.append(row.error or "ok")
        process = stage._frames._decoder._process
        if number % max(1, num_rows // 10) == 0 and process is not None:
            decoder, here = read_memory(process.pid), read_memory("self")
            curve.append(decoder.now)
            print(f"| {number} | {decoder.now} | {decoder.peak} | {here.now} | {here.peak} |", flush=True)
    for status in sorted(set(statuses)):
        print(f"{statuses.count(status)} of {num_rows}: {status}")
    print(f"decoder after the first tenth {curve[0]} MiB, at most {max(curve)} MiB later")
    sys.exit(set(statuses) != {"ok"})


def read_memory(process: int | str) -> Memory:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return Memory(*(int(fields[name].split()[0]) >> 10 for name in ("VmRSS", "VmHWM")))


if __name__ == "__main__":
    main()
