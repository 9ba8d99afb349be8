"""--save-frames writes what the model sees as JPEG, before a row is finished, under names that any id allows."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from s3fs import S3FileSystem

from pipelines.errors import RunError, StoreFault
from pipelines.media.saving import FrameSaver, check_saved_frames, encode_jpeg, make_names
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.buckets import BUCKET
from tests.support.fake_engine import FakeEngineFactory
from tests.support.job_configs import make_job_config
from tests.support.pictures import draw
from tests.support.stages import prepare_rows
from tests.support.videos import draw_shots, read_number, write_video


def read_pixels(directory: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(directory / name))


@given(st.text(), st.text())
def test_names_are_safe_and_differ_as_ids_do(one: str, other: str) -> None:
    for id_ in (one, other):
        [name] = make_names(id_, 1)
        folder, slash, file = name.partition("/")
        assert slash and len(folder) == 2 and len(os.fsencode(file)) < 200
        assert not set(file) & set('/\\:*?"<>|%#\0\n ') and not file.startswith((".", "-"))
    assert one == other or make_names(one, 1)[0].lower() != make_names(other, 1)[0].lower()


def test_the_end_of_a_path_is_readable_in_the_name() -> None:
    first, second = make_names("s3://bucket/films/Ä clip.mp4#t=0.5,2", 2)
    assert first[3:].startswith("s3_bucket_films_Ä_clip.mp4_t_0.5_2-") and first.endswith("-000.jpg")
    assert second == first.replace("-000", "-001")
    assert make_names("x" * 500 + "/end.png", 1)[0].count("end.png") == 1


def test_saved_frames_are_those_that_the_model_sees(tmp_path: Path) -> None:
    source, saved = tmp_path / "in", tmp_path / "frames"
    source.mkdir()
    write_video(source / "a.mp4", 100)
    draw(source / "b.png", seed=1, width=90, height=60)
    (source / "c.png").write_bytes(b"no picture")
    config = make_job_config([source], tmp_path / "out", num_frames=4, save_frames=str(saved))
    video, picture, failed = prepare_rows(config)
    assert [read_number(read_pixels(saved, name)) for name in video.saved_frames] == [12, 37, 62, 87]
    original = np.asarray(Image.open(source / "b.png").convert("RGB"), np.int16)
    assert np.abs(read_pixels(saved, picture.saved_frames[0]) - original).mean() < 8
    assert failed.saved_frames == ()
    assert sum(len(files) for _, _, files in os.walk(saved)) == 5


@pytest.mark.parametrize("selection", ["uniform", "mdp3"])
def test_questions_about_one_video_save_the_frames_of_each_row(tmp_path: Path, selection: str) -> None:
    """Their frames are decoded once, and kept with their files."""
    clip = write_video(tmp_path / "a.mp4", 100)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"video": "{clip}", "prompt": "{n}?", "id": "{n}"}}\n' for n in range(2)))
    options = {"frame_selection": selection, "frame_encoder": "pixels", "num_candidates": 10, "id_column": "id"}
    config = make_job_config([rows], tmp_path / "out", num_frames=2, save_frames=str(tmp_path / "f"), **options)
    one, other = prepare_rows(config)
    assert len(one.saved_frames) == 2 and not set(one.saved_frames) & set(other.saved_frames)
    for name, again in zip(one.saved_frames, other.saved_frames, strict=True):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "f" / again).read_bytes()


def test_a_run_with_shots_is_resumed_with_its_frames(tmp_path: Path, ray_cluster: None) -> None:
    """Rows are named by their part of the video; a resumed run writes only those of its rows, with equal bytes."""
    clips, saved, output = tmp_path / "clips", tmp_path / "frames", tmp_path / "out"
    clips.mkdir()
    for number in range(3):
        write_video(clips / f"{number}.mp4", draw_shots(*[25] * (1 + number)))
    options = {"split": "shots", "num_frames": 2, "media_columns": True, "save_frames": str(saved)}
    config = make_job_config([clips], output, rows_per_file=2, **options)
    run_pipeline(config, make_engine=FakeEngineFactory())
    rows = read_results(str(output)).to_pylist()
    assert [len(row["saved_frames"]) for row in rows] == [2] * 6
    names = [name for row in rows for name in row["saved_frames"]]
    assert [name.rsplit("-", 2)[0].rpartition("clips_")[2] for name in names[2::2]] == [
        "1.mp4_t_0_1",
        *("1.mp4_t_1", "2.mp4_t_0_1", "2.mp4_t_1_2", "2.mp4_t_2"),
    ]
    before = {name: (saved / name).read_bytes() for name in names}
    sorted((output / "data").iterdir())[-1].unlink()
    for name in names:
        (saved / name).unlink()
    run_pipeline(config, make_engine=FakeEngineFactory())
    again = read_results(str(output)).to_pylist()
    assert [row["saved_frames"] for row in again] == [row["saved_frames"] for row in rows]
    written = {name for name in names if (saved / name).exists()}
    assert 0 < len(written) < len(names)
    assert all((saved / name).read_bytes() == before[name] for name in written)
    with pytest.raises(RunError, match="save-frames"):
        run_pipeline(make_job_config([clips], output, rows_per_file=2, **{**options, "save_frames": None}))


def test_frames_are_saved_in_an_object_store(bucket: S3FileSystem) -> None:
    names = FrameSaver(f"{BUCKET}/frames").save("a/b.mp4", [b"one", b"two"])
    assert [bucket.cat_file(f"{BUCKET}/frames/{name}") for name in names] == [b"one", b"two"]


def test_a_directory_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFault, match="frames cannot be saved in"):
        FrameSaver(str(tmp_path / "file")).save("a", [b"one"])


def test_a_directory_that_would_become_input_or_output_is_refused(tmp_path: Path) -> None:
    for place in ("in/frames", "in", "out", "out/data/x", "file/frames"):
        (tmp_path / "file").write_text("")
        config = make_job_config([tmp_path / "in"], tmp_path / "out", save_frames=str(tmp_path / place))
        with pytest.raises(RunError, match="--save-frames"):
            check_saved_frames(config)
    for place in ("out/frames", "in-frames"):
        check_saved_frames(make_job_config([tmp_path / "in"], tmp_path / "out", save_frames=str(tmp_path / place)))
        assert (tmp_path / place).is_dir()


def test_an_image_beyond_the_limit_of_jpeg_is_shrunk() -> None:
    assert Image.open(io.BytesIO(encode_jpeg(Image.new("RGB", (70_000, 10))))).size == (65_500, 9)
