"""Items about videos are asked with the frames that VLMEvalKit takes; a video that cannot be read is an error row."""

from __future__ import annotations

import ast
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.benchmarks import VIDEO_FAMILIES, write_benchmarks
from pipelines.evaluation.benchmarks import DATASETS
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.files import read_items
from pipelines.evaluation.frames import FrameRule
from pipelines.evaluation.run import run_evaluation
from pipelines.evaluation.scoring.scores import ScoringRules
from pipelines.evaluation.videos import Clip, Frames, UnreadableVideo, encode_frame, extract_frames, find_clip
from pipelines.output.sink import read_results
from tests.support.fake_engine import FakeEngineFactory
from tests.support.videos import draw_number, read_number, write_video

FPS = 25
FOUR = FrameRule(num_frames=4)
SRT = "1\n00:00:00,000 --> 00:00:02,000\nfirst words\n\n2\n00:00:02,100 --> 00:00:09,000\nlast\\Nwords\n"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a directory with a video of 100 numbered frames, a GIF of 10, and a folder of 12 images."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "long.mp4", 100, fps=FPS, key_every=30)
    pictures = [Image.fromarray(draw_number(number)) for number in range(10)]
    pictures[0].save(root / "short.gif", save_all=True, append_images=pictures[1:], duration=40)
    (root / "folder").mkdir()
    for number in range(1, 13):
        (root / "folder" / f"{number:05d}.jpg").write_bytes(encode_frame(draw_number(number)))
    (root / "broken.mp4").write_bytes((root / "long.mp4").read_bytes()[:2000])
    return root


def extract(name: str, clip: Clip, root: Path, rule: FrameRule, target: Path) -> Frames:
    found = extract_frames(DATASETS[name], [clip], str(root), rule, str(target))[clip]
    assert isinstance(found, Frames)
    return found


@pytest.mark.parametrize(
    ("name", "clip", "rule", "wanted"),
    [
        ("Video-MME", Clip("long.mp4", "video"), FOUR, [20, 40, 60, 80]),
        ("MLVU_MCQ", Clip("long.mp4", "video"), FrameRule(4, fps=2), [0, 12, 25, 37, 50, 62, 75, 87]),
        ("MVBench_MP4", Clip("long.mp4", "video"), FOUR, [12, 37, 62, 86]),
        ("MVBench", Clip("long.mp4", "video", (1.0, 2.0)), FOUR, [28, 34, 40, 47]),
        ("MVBench", Clip("short.gif", "gif"), FOUR, [1, 3, 5, 8]),
        ("MVBench", Clip("folder", "frame"), FOUR, [2, 5, 8, 10]),
    ],
)
def test_frames_are_those_with_the_numbers_of_vlmevalkit(
    name: str, clip: Clip, rule: FrameRule, wanted: list[int], videos: Path, tmp_path: Path
) -> None:
    """Numbers of frames are drawn into them; those in a folder begin at 1."""
    frames = extract(name, clip, videos, rule, tmp_path)
    shown = [read_number(_read_pixels(uri)) for uri in frames.uris]
    assert shown == list(frames.indices) == wanted


def _read_pixels(uri: str) -> Any:
    with Image.open(uri) as image:
        assert image.format == "JPEG"
        return np.asarray(image)


def test_frames_are_extracted_once(videos: Path, tmp_path: Path) -> None:
    clip = Clip("long.mp4", "video")
    first = extract("Video-MME", clip, videos, FOUR, tmp_path)
    Path(first.uris[0]).write_bytes(b"mine")
    assert extract("Video-MME", clip, videos, FOUR, tmp_path) == first
    assert Path(first.uris[0]).read_bytes() == b"mine"
    extract_frames(DATASETS["Video-MME"], [clip], str(videos), FOUR, str(tmp_path), reuse=False)
    assert read_number(_read_pixels(first.uris[0])) == 20


@pytest.mark.parametrize(
    ("path", "rule", "reason"),
    [
        ("nowhere.mp4", FOUR, "No such file"),
        ("broken.mp4", FOUR, "damaged"),
        ("long.mp4", FrameRule(4, fps=0.1), "too short for a frame at 0.1"),
    ],
)
def test_a_video_that_cannot_be_shown_says_why(
    path: str, rule: FrameRule, reason: str, videos: Path, tmp_path: Path
) -> None:
    clip = Clip(path, "video")
    found = extract_frames(DATASETS["Video-MME"], [clip], str(videos), rule, str(tmp_path))[clip]
    assert isinstance(found, UnreadableVideo) and str(found).startswith(path) and reason in str(found)


def test_clips_are_found_where_vlmevalkit_looks() -> None:
    assert find_clip({"index": 0, "video": "a"}).path == "video/a.mp4"
    assert find_clip({"index": 0, "prefix": "./x/", "video": "b/a.webm"}).path == "x/b/a.webm"
    assert find_clip({"index": 0, "prefix": "x", "video": "a", "suffix": ".mp4"}).path == "x/a.mp4"
    bounded = find_clip({"index": 0, "prefix": "x", "video": "a", "bound": True, "start": 1.5, "end": 2})
    assert bounded.bounds_s == (1.5, 2.0) and bounded.folder == "x/a/1.5-2"
    for video in ("../a", "/etc/passwd", "s3://bucket/a"):
        with pytest.raises(ValueError, match=r"index 7: .* is not below"):
            find_clip({"index": 7, "prefix": "" if video[0] == "/" else ".", "video": video})


def write_video_mme(directory: Path, videos: Path, *names: str) -> None:
    """Write Video-MME.tsv with a question about each video, and the videos and subtitles beside it."""
    (directory / "video").mkdir(parents=True)
    (directory / "subtitle").mkdir()
    columns = ["index", "video", "duration", "domain", "sub_category", "task_type", "subtitle_path", "question"]
    with (directory / "Video-MME.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow([*columns, "candidates", "answer"])
        for index, name in enumerate(names):
            about = ["short", "Drawing", "Shapes", "Counting", f"./subtitle/{name}.srt", "What <image> is it?"]
            writer.writerow([index, name, *about, "['A. one.', 'B. two.', 'C. three.', 'D. four.']", "A"])
            if (videos / f"{name}.mp4").exists():
                shutil.copy(videos / f"{name}.mp4", directory / "video")
    (directory / "subtitle" / "long.srt").write_text(SRT)


def make_config(tmp_path: Path, **options: Any) -> EvaluateConfig:
    given = {"benchmark": "Video-MME", "input": (str(tmp_path / "in"),), "output": str(tmp_path / "out"), "size": "1B"}
    return EvaluateConfig(model="demo", **{**given, "num_frames": 4, **options})


def test_videos_are_asked_and_unreadable_ones_are_error_rows(videos: Path, tmp_path: Path) -> None:
    """The answers of the fake engine are no letters; the third video is damaged, the fourth does not exist."""
    write_video_mme(tmp_path / "in", videos, "long", "long", "broken", "nowhere")
    config = make_config(tmp_path, subtitles=True)
    report = run_evaluation(config, make_engine=FakeEngineFactory())
    assert (report.rows, report.ok, report.error) == (4, 2, 2)
    table = read_results(str(tmp_path / "out" / "runs" / "Video-MME"))
    first, second = table.column("prompt").to_pylist()
    assert first == second and first.count("<image>") == 4 and "What  is it?\nA. one." in first
    assert "listed below:\nfirst words\nfirst words\nlast words\nlast words\n" in first
    assert table.column("num_images").to_pylist() == [4, 4]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["Video-MME"]
    assert scores["error_rows"].keys() == {"2", "3"} and "video/nowhere.mp4" in scores["error_rows"]["3"]
    assert scores["rows"] == {"0": 0, "1": 0, "2": 0, "3": 0} and scores["difference"] == -49.5
    assert run_evaluation(config, make_engine=FakeEngineFactory()).scores == report.scores
    with pytest.raises(ValueError, match="--overwrite"):
        run_evaluation(make_config(tmp_path), make_engine=FakeEngineFactory())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "MMStar", "subtitles": True}, "without subtitles"),
        ({"benchmark": "MVBench", "fps": 1.0}, "take MVBench_MP4"),
    ],
)
def test_what_vlmevalkit_cannot_ask_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_a_directory_without_the_videos_is_refused(videos: Path, tmp_path: Path) -> None:
    write_video_mme(tmp_path / "in", videos, "nowhere")
    with pytest.raises(ValueError, match="--image-root names their directory"):
        run_evaluation(make_config(tmp_path), make_engine=FakeEngineFactory())
    assert not (tmp_path / "out" / "runs").exists()


def test_right_answers_to_the_demo_benchmarks_score_100(tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    for name in VIDEO_FAMILIES:
        dataset, items = DATASETS[name], read_items(str(tmp_path / f"{name}.tsv"))
        answers = {str(item["index"]): _format_right(name, item) for item in items}
        assert dataset.scorer is not None
        assert dataset.headline(dataset.scorer(items, answers, ScoringRules()).table, ScoringRules()) == 100


def _format_right(name: str, item: Any) -> str:
    if name in ("MVBench", "MLVU_MCQ"):
        return f"({'ABCD'[ast.literal_eval(item['candidates']).index(item['answer'])]})"
    return str(item["answer"])
