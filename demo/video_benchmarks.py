"""Write tiny benchmarks about videos, each of which shows one drawing for two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from demo.drawings import SceneQuestion

NUM_FRAMES, FPS = 20, 10
_PREFIX = "video"

Row = dict[str, object]
MakeVideoRows = Callable[[str, SceneQuestion, tuple[str, ...]], Iterator[Row]]
"""Name of the video, a question, and its options -> rows."""


def write_video(path: Path, image: Image.Image) -> None:
    """Write a video that shows an image."""
    write_frames(path, [image] * NUM_FRAMES)


def write_frames(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write a video of frames of one size, without their last row or column if their number is odd."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = frames[0].width // 2 * 2, frames[0].height // 2 * 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_000_000
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB").crop((0, 0, width, height)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def write_subtitles(path: Path, text: str) -> None:
    """Write subtitles that show one text all the time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"1\n00:00:00,000 --> 00:01:00,000\n{text}\n", "utf-8")


def make_video_mme_rows(video: str, question: SceneQuestion, options: tuple[str, ...]) -> Iterator[Row]:
    """Yield a question with lettered options, and subtitles beside the video."""
    lettered = _assign_letters(options, "{}. {}.")
    # VLMEvalKit summarizes the domains and types of the published file only.
    about = {"duration": "short", "domain": "Knowledge", "sub_category": "Geography", "task_type": "Counting Problem"}
    files = {"video": video, "video_path": f"./video/{video}.mp4", "subtitle_path": f"./subtitle/{video}.srt"}
    answer = "ABCD"[options.index(question.answer)]
    yield {**about, **files, "question": question.text, "candidates": repr(lettered), "answer": answer}


def make_mvbench_rows(video: str, question: SceneQuestion, options: tuple[str, ...]) -> Iterator[Row]:
    """Yield a question about the whole video, and the same about its second second."""
    about = {"task_type": "Moving Count", "prefix": _PREFIX, "data_type": "video", "video": f"{video}.mp4"}
    row = {**about, "question": question.text, "answer": question.answer, "candidates": repr(list(options))}
    yield {**row, "bound": False, "start": "", "end": ""}
    yield {**row, "bound": True, "start": 1.0, "end": 2.0}


def make_mlvu_rows(video: str, question: SceneQuestion, options: tuple[str, ...]) -> Iterator[Row]:
    """Yield a question of the half with options."""
    about = {"task_type": "count", "prefix": _PREFIX, "video": f"{video}.mp4", "duration": 2.0}
    yield {**about, "question": question.text, "answer": question.answer, "candidates": repr(list(options))}


def make_temp_compass_rows(video: str, question: SceneQuestion, options: tuple[str, ...]) -> Iterator[Row]:
    """Yield a question with lettered options."""
    lettered = _assign_letters(options, "{}. {}")
    about = {"task_type": "multi-choice", "dim": "order", "prefix": _PREFIX, "suffix": ".mp4", "video": video}
    answer = lettered[options.index(question.answer)]
    yield {**about, "question": question.text, "answer": answer, "candidates": repr(lettered)}


def _assign_letters(options: tuple[str, ...], form: str) -> list[str]:
    return [form.format(letter, option) for letter, option in zip("ABCD", options, strict=False)]


MAKE_VIDEO_ROWS: dict[str, MakeVideoRows] = {
    "Video-MME": make_video_mme_rows,
    "MVBench": make_mvbench_rows,
    "MLVU_MCQ": make_mlvu_rows,
    "TempCompass_MCQ": make_temp_compass_rows,
}
