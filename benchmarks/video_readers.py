"""Compare the CPU time of twelve frames of a clip with that of decord and OpenCV.

    pip install decord opencv-python-headless
    python -m benchmarks.video_readers [CLIP ...]

Without clips, five of the test packages and two drawn ones are read: ten minutes of 320 x 180 with a key frame every
250, and a minute of 1080p. All read the frames of the same numbers, in one thread, as RGB in full size. Medians of
three rounds in which the readers alternate; a reader that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.video_memory import HD, enlarge
from ovis_model.inputs.keyframes import select_uniform
from pipelines.media.video.sampling import decode_frames_at, read_frame_times
from tests.support.videos import CLIPS, draw_number, find_clip, write_video

NUM_FRAMES, ROUNDS = 12, 3

Reader = Callable[[Path, Sequence[int], Sequence[float]], int]


def main(paths: Sequence[Path]) -> None:
    with tempfile.TemporaryDirectory() as place:
        readers = find_readers()
        print(f"| clip | frames | {' | '.join(readers)} |\n|---|---|{'---|' * len(readers)}")
        for path in paths or [*map(find_clip, CLIPS), *draw_clips(Path(place))]:
            with path.open("rb") as file:
                times_s = read_frame_times(file).times_s
            numbers = [int(number) for number in select_uniform(len(times_s), NUM_FRAMES)]
            costs = measure(readers, path, numbers, [times_s[number] for number in numbers])
            shown = " | ".join(f"{cost:.3f} s" if cost is not None else "-" for cost in costs)
            print(f"| {path.name} | {len(times_s)} | {shown} |", flush=True)


def draw_clips(directory: Path) -> list[Path]:
    small = (enlarge(draw_number(number), (180, 320)) for number in range(15_000))
    large = (enlarge(draw_number(number), HD) for number in range(1500))
    return [
        write_video(directory / "ten-minutes.mp4", small, key_every=250),
        write_video(directory / "minute-1080p.mp4", large, key_every=250),
    ]


def find_readers() -> dict[str, Reader]:
    """Return the readers that are installed, by name."""
    readers: dict[str, Reader] = {"here": read_here, "here, every frame": read_every_frame}
    for module, reader in {"decord": read_with_decord, "cv2": read_with_opencv}.items():
        if importlib.util.find_spec(module):
            readers[module] = reader
    return readers


def measure(
    readers: dict[str, Reader], path: Path, numbers: Sequence[int], times_s: Sequence[float]
) -> list[float | None]:
    """Return the median CPU seconds of each reader; None if it does not return all frames."""
    costs: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            start_s = time.process_time()
            if read(path, numbers, times_s) == len(numbers):
                costs[name].append(time.process_time() - start_s)
    return [statistics.median(values) if values else None for values in costs.values()]


def read_here(path: Path, numbers: Sequence[int], times_s: Sequence[float]) -> int:
    with path.open("rb") as file:
        return len(decode_frames_at(file, times_s))


def read_every_frame(path: Path, numbers: Sequence[int], times_s: Sequence[float]) -> int:
    """Decode all frames with PyAV and keep the wanted ones: what skipping saves."""
    import av

    wanted = set(numbers)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        return sum(
            frame.to_ndarray(format="rgb24").ndim == 3
            for number, frame in enumerate(container.decode(video=0))
            if number in wanted
        )


def read_with_decord(path: Path, numbers: Sequence[int], times_s: Sequence[float]) -> int:
    import decord

    return len(decord.VideoReader(str(path), num_threads=1).get_batch(list(numbers)).asnumpy())


def read_with_opencv(path: Path, numbers: Sequence[int], times_s: Sequence[float]) -> int:
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    count = 0
    for number in numbers:
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        is_read, frame = capture.read()
        count += bool(is_read) and np.ascontiguousarray(frame[..., ::-1]).ndim == 3
    capture.release()
    return count


if __name__ == "__main__":
    main(list(map(Path, sys.argv[1:])))
