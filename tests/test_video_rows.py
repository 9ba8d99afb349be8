"""Videos from every kind of INPUT become rows and the model's input, without Ray and torch."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovis_model.inputs.processor import Processor
from ovis_model.inputs.prompt import build_video_query
from pipelines.config import CaptionConfig
from pipelines.errors import SourceError
from pipelines.media.frame_selection import Encoder, FrameSelector, PixelEncoder
from pipelines.media.reference import VideoLocation, Window
from pipelines.rows import PreparedRow
from pipelines.storage import store
from tests.support.golden_data import checkpoint_dir
from tests.support.stages import prepare_rows
from tests.support.videos import SHOT_STARTS, draw_number, find_clip, read_number, write_sound, write_video

MODEL = str(checkpoint_dir("tiny112-untied"))
UNIFORM_4 = [12, 37, 62, 87]  # of 100 frames

Row = dict[str, Any]


def prepare_videos(
    tmp_path: Path, *inputs: Path | str, encoder: Encoder | None = None, **options: Any
) -> list[PreparedRow]:
    config = CaptionConfig(
        input=tuple(map(str, inputs)),
        output=str(tmp_path / "out"),
        model=MODEL,
        **{"max_new_tokens": 8, "num_frames": 4, **options},
    )
    return prepare_rows(config, encoder)


def to_frame_numbers(row: PreparedRow) -> list[int]:
    """Convert the times of a row's frames to frame numbers of the drawn video."""
    return [round(float(time_s) * 25) for time_s in row.frame_timestamps_s]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a video of 100 numbered frames, four seconds."""
    return write_video(tmp_path_factory.mktemp("drawn") / "a.mp4", 100)


def test_a_row_is_the_model_cards_video_prompt_with_one_tile_per_frame(tmp_path: Path, drawn: Path) -> None:
    (row,) = prepare_videos(tmp_path, drawn, prompt="What happens?")
    pictures = [Image.fromarray(frame) for frame in map(open_frame_reader(drawn), UNIFORM_4)]
    expected = Processor.from_pretrained(MODEL).build_request(
        build_video_query("What happens?", 4), pictures, max_tiles=1
    )
    assert np.array_equal(row.requests[0].input_ids, expected.input_ids)
    assert np.array_equal(row.requests[0].tiles, expected.tiles)
    assert (row.num_images, len(row.requests[0].tiles), to_frame_numbers(row)) == (4, 4, UNIFORM_4)
    assert row.frame_timestamps_s.dtype == np.float32


def open_frame_reader(path: Path) -> Any:
    from moviepy.video.io.ffmpeg_reader import FFMPEG_VideoReader

    reader = FFMPEG_VideoReader(str(path), decode_file=False)
    return lambda index: reader.get_frame(index / 25)


def test_max_tiles_allows_several_tiles_per_frame(tmp_path: Path, drawn: Path) -> None:
    (row,) = prepare_videos(tmp_path, drawn, max_tiles=4, num_frames=2)
    assert len(row.requests[0].tiles) > 2


def test_videos_and_images_of_a_directory_become_rows(tmp_path: Path, drawn: Path) -> None:
    directory = tmp_path / "media"
    directory.mkdir()
    (directory / "a.MP4").write_bytes(drawn.read_bytes())
    Image.new("RGB", (50, 40)).save(directory / "b.png")
    write_video(directory / "c.webm", 30, codec="libvpx")
    (directory / "notes.txt").write_text("left out")
    rows = prepare_videos(tmp_path, directory)
    assert [Path(row.uri).name for row in rows] == ["a.MP4", "b.png", "c.webm"]
    assert [row.num_images for row in rows] == [4, 1, 4]
    assert [len(row.frame_timestamps_s) for row in rows] == [4, 0, 4]
    assert [row.prompt for row in rows] == ["Describe the video.", "Describe the image.", "Describe the video."]


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_videos_are_read_from_tars(tmp_path: Path, drawn: Path, name: str) -> None:
    sidecar = tmp_path / "a.json"
    sidecar.write_text(json.dumps({"question": "Who?"}))
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
        tar.add(drawn, "x/a.mp4")
        tar.add(sidecar, "x/a.json")
        tar.add(find_clip("carphone_pristine.mp4"), "b.mp4")
    rows = prepare_videos(tmp_path, tmp_path / name, prompt_column="question")
    assert [row.id.rsplit("#")[1] for row in rows] == ["x/a", "b"]
    assert [row.prompt for row in rows] == ["Who?", "Describe the video."]
    assert to_frame_numbers(rows[0]) == UNIFORM_4
    assert [row.num_images for row in rows] == [4, 4]


def test_parquet_holds_videos_as_bytes_or_uris(tmp_path: Path, drawn: Path) -> None:
    data = drawn.read_bytes()
    pq.write_table(pa.table({"clip": [data, b"junk"]}), tmp_path / "bytes.parquet")
    pq.write_table(pa.table({"clip": [{"bytes": data, "path": None}]}), tmp_path / "struct.parquet")
    pq.write_table(pa.table({"video": [str(drawn), f"{drawn}#t=2,4"]}), tmp_path / "names.parquet")
    rows = [
        row
        for name in ("bytes", "struct", "names")
        for row in prepare_videos(tmp_path / name, tmp_path / f"{name}.parquet")
    ]
    assert [row.stage for row in rows] == ["", "decode", "", "", ""]
    assert [to_frame_numbers(rows[i]) for i in (0, 2, 3)] == [UNIFORM_4] * 3
    assert to_frame_numbers(rows[4]) == [56, 68, 81, 93]


def test_windows_are_read_from_the_fragment_of_the_uri(tmp_path: Path, drawn: Path) -> None:
    lines = [
        {"video": f"{drawn}#t=1,2", "prompt": "Describe it."},
        {"uri": f"{drawn}#t=3"},
        {"image": f"{drawn}#t=,1"},
        {"video": f"{drawn}#t=2,1"},
        {"video": f"{drawn}#t=1:00"},
        {"video": f"{drawn}#t=60,70"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = prepare_videos(tmp_path, tmp_path / "list.jsonl")
    assert [to_frame_numbers(row) for row in rows[:3]] == [[28, 34, 40, 46], [78, 84, 90, 96], [3, 9, 15, 21]]
    assert rows[0].uri == f"{drawn}#t=1,2"
    assert [(row.stage, row.error) for row in rows[3:]] == [
        ("list", "the window #t=2,1 ends before it starts"),
        ("list", "'#t=1:00' is not a window in seconds; write e.g. #t=10,20 or #t=10"),
        ("decode", "the window starts at 60 s, the video ends at 4 s"),
    ]


def test_an_input_may_name_a_window(tmp_path: Path, drawn: Path) -> None:
    (row,) = prepare_videos(tmp_path, f"{drawn}#t=1,2")
    assert to_frame_numbers(row) == [28, 34, 40, 46]
    assert row.id == row.uri == f"{drawn}#t=1,2"
    with pytest.raises(SourceError, match="does not exist"):
        prepare_videos(tmp_path / "other", f"{drawn}x#t=1,2")


def test_failures_are_error_rows_with_their_stage(tmp_path: Path, drawn: Path) -> None:
    write_sound(tmp_path / "sound.mp4")
    lines = [
        {"video": str(tmp_path / "gone.mp4")},
        {"video": str(tmp_path / "sound.mp4")},
        {"image": [str(drawn), str(drawn)]},
        {"video": str(drawn), "prompt": "long " * 40_000},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = prepare_videos(tmp_path, tmp_path / "list.jsonl")
    assert [row.stage for row in rows] == ["read", "decode", "decode", "tile"]
    assert rows[0].error == "No such file or directory"
    assert "holds audio" in rows[1].error
    assert "a row with a video must hold nothing else" in rows[2].error
    assert "--num-frames" in rows[3].error


def test_a_video_that_is_a_file_is_not_fetched(tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the parts that hold the frames are read, however large the file is."""

    def refuse(uri: str, *bounds: object) -> bytes:
        raise AssertionError(f"{uri} is read whole")

    monkeypatch.setattr(store, "read_bytes", refuse)
    (row,) = prepare_videos(tmp_path, drawn)
    assert row.stage == ""


class Counted(PixelEncoder):
    """An encoder that matches frames to the words red, green and blue, and counts its calls."""

    def __init__(self) -> None:
        self.num_frames = self.num_texts = 0

    def encode_frames(self, pictures: np.ndarray) -> np.ndarray:
        self.num_frames += 1
        return normalize(pictures.reshape(len(pictures), -1, 3).mean(axis=1) + 1).astype(np.float32)

    def encode_text(self, text: str) -> np.ndarray:  # type: ignore[override]
        self.num_texts += 1
        return normalize(np.array([[name in text for name in ("red", "green", "blue")]]) + 1e-3)[0].astype(np.float32)


def normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a video with one second each of red, green and blue."""
    pictures = [np.full((64, 64, 3), 255 * np.eye(3, dtype=np.uint8)[i // 25]) for i in range(75)]
    return write_video(tmp_path_factory.mktemp("colours") / "colours.mp4", pictures)


def test_questions_about_one_video_share_its_frames(tmp_path: Path, colours: Path) -> None:
    questions = ["Where is red?", "Where is blue?", "Where is blue?", "Where is green?"]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"video": str(colours), "prompt": q}) for q in questions))
    encoder = Counted()
    rows = prepare_videos(
        tmp_path, tmp_path / "list.jsonl", encoder=encoder, frame_selection="top-k", num_candidates=30, num_frames=3
    )
    assert [set(np.floor(row.frame_timestamps_s).tolist()) for row in rows] == [{0}, {2}, {2}, {1}]
    assert (encoder.num_frames, encoder.num_texts) == (1, 3)


def test_frames_may_match_another_text_than_the_question(tmp_path: Path, colours: Path) -> None:
    options = {"frame_selection": "top-k", "num_candidates": 30, "num_frames": 3, "prompt": "Describe red."}
    (row,) = prepare_videos(tmp_path, colours, encoder=Counted(), frame_query="blue", **options)
    assert set(np.floor(row.frame_timestamps_s).tolist()) == {2}


def test_mdp3_without_a_model_shows_every_colour(tmp_path: Path, colours: Path) -> None:
    (row,) = prepare_videos(tmp_path, colours, frame_selection="mdp3", frame_encoder="pixels", num_frames=3)
    assert np.floor(row.frame_timestamps_s).tolist() == [0, 1, 2]


def test_black_frames_are_not_key_frames_where_others_are(tmp_path: Path) -> None:
    pictures = [draw_number(number) if number % 2 else np.zeros((64, 256, 3), np.uint8) for number in range(40)]
    path = write_video(tmp_path / "flicker.mp4", pictures)
    options = {"frame_selection": "mdp3", "frame_encoder": "pixels", "num_candidates": 40, "num_frames": 8}
    (row,) = prepare_videos(tmp_path, path, **options)
    assert len(row.frame_timestamps_s) == 8
    assert all(number % 2 for number in to_frame_numbers(row))
    black = write_video(tmp_path / "black.mp4", np.zeros((40, 64, 256, 3), np.uint8))
    (row,) = prepare_videos(tmp_path / "black", black, **options)
    assert len(row.frame_timestamps_s) == 8


def test_recent_videos_are_cached_up_to_a_limit(colours: Path) -> None:
    """The last one always stays in the cache, so that consecutive rows of a video decode it once."""
    config = CaptionConfig(input=("x",), output="y", model=MODEL)
    selector = FrameSelector(config, max_recent_bytes=1)
    place = VideoLocation(str(colours))
    first = selector.select(place, Window(), "")
    assert selector.select(place, Window(), "") is first
    selector.select(VideoLocation(str(find_clip("carphone_pristine.mp4"))), Window(), "")
    assert selector.select(place, Window(), "") is not first


def count_shots(row: Row) -> int:
    """Count how many of the six shots of bikes.mp4 the row shows."""
    starts = np.array(SHOT_STARTS)
    return len({int(np.searchsorted(starts, round(float(t) * 25), "right")) for t in row.frame_timestamps_s})


def test_six_chosen_frames_show_the_shots_of_a_real_clip(tmp_path: Path) -> None:
    (even,) = prepare_videos(tmp_path / "even", find_clip("bikes.mp4"), num_frames=6)
    (chosen,) = prepare_videos(
        tmp_path / "chosen", find_clip("bikes.mp4"), num_frames=6, frame_selection="mdp3", frame_encoder="pixels"
    )
    assert count_shots(chosen) >= 5
    assert count_shots(chosen) >= count_shots(even)


def test_options_without_enough_to_choose_from_are_refused() -> None:
    for options in (
        {"frame_selection": "top-k", "frame_encoder": "pixels"},
        {"frame_selection": "top-k", "frame_query": ""},
        {"frame_selection": "mdp3", "num_candidates": 5},
    ):
        with pytest.raises(ValueError, match=r"--frame-selection top-k|--num-candidates"):
            CaptionConfig(input=("x",), output="y", model="demo", **options)  # type: ignore[arg-type]


def test_numbered_frames_survive_the_model_input(tmp_path: Path) -> None:
    """The model sees the frames at the row's times."""
    path = write_video(
        tmp_path / "large.mp4", (np.kron(draw_number(i), np.ones((2, 2, 1), np.uint8)) for i in range(100))
    )
    (row,) = prepare_videos(tmp_path, path)
    tiles, sizes = row.requests[0].tiles, row.requests[0].tile_sizes
    for tile, (height, width), number in zip(tiles, sizes.tolist(), UNIFORM_4, strict=True):
        top, left = (tile.shape[1] - height) // 2, (tile.shape[2] - width) // 2
        assert read_number(tile[:, top : top + height, left : left + width].transpose(1, 2, 0)) == number
