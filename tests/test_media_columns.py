"""Columns about the media and about warnings, on request: typed, null in error rows, the same after a resume."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines import schema
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from pipelines.report.build import ReportOptions, write_report
from pipelines.rows import MediaFacts, PreparedRow
from tests.support.fake_engine import FakeEngineFactory
from tests.support.job_configs import make_annotate_config, make_job_config
from tests.support.pictures import draw
from tests.support.scenes import draw_scene, encode_image
from tests.support.stages import prepare_rows
from tests.support.videos import write_video

MEDIA = [field.name for field in schema.MEDIA]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    directory = tmp_path / "pictures"
    directory.mkdir()
    draw(directory / "a.png", seed=1, width=90, height=60)
    exif = Image.Exif()
    exif[0x0112] = 6
    (directory / "b.jpg").write_bytes(encode_image(draw_scene(80, 50), "JPEG", exif=exif))
    (directory / "c.webp").write_bytes(encode_image(draw_scene(30, 40), "WEBP"))
    (directory / "d.png").write_bytes(encode_image(draw_scene(300, 400), "PNG")[:-900])
    (directory / "e.gif").write_bytes(b"not a picture")
    write_video(directory / "f.mp4", 20)
    return directory


def test_rows_carry_facts_about_their_media(pictures: Path, tmp_path: Path) -> None:
    rows = prepare_rows(make_job_config([pictures], tmp_path / "out", media_columns=True))
    sizes = [path.stat().st_size for path in sorted(pictures.iterdir())]
    facts = [row.media for row in rows]
    assert facts[:3] == [
        MediaFacts(90, 60, "PNG", sizes[0]),
        MediaFacts(50, 80, "JPEG", sizes[1]),  # upright
        MediaFacts(30, 40, "WebP", sizes[2]),
    ]
    assert facts[3] is facts[4] is None
    video = facts[5]
    assert video is not None and video.codec and video.fps and video.duration_s and video.bytes == sizes[5]
    assert video.repeated_share is not None and video.corrupt_share == 0


def test_a_row_keeps_its_facts_between_stages() -> None:
    facts = MediaFacts(3, 4, "mov", 5, 1.5, 29.97, "h264", 0.25, 0.0)
    rows = [PreparedRow(0, "a", "a", "?", media=facts, warning="doubtful"), PreparedRow(1, "b", "b", "?")]
    again = PreparedRow.from_columns(PreparedRow.to_columns(rows))
    assert [(row.media, row.warning) for row in again] == [(facts, "doubtful"), (None, "")]


def test_a_run_writes_the_columns_and_resumes_with_them(pictures: Path, tmp_path: Path, ray_cluster: None) -> None:
    output = tmp_path / "out"
    config = make_job_config([pictures], output, media_columns=True, partial_images="keep", rows_per_file=2)

    def run() -> pa.Table:
        run_pipeline(config, make_engine=FakeEngineFactory())
        return read_results(str(output))

    whole = run()
    assert whole.schema.names[-len(MEDIA) - 1 :] == ["warning", *MEDIA]
    assert [whole.schema.field(name) for name in MEDIA] == list(schema.MEDIA)
    rows = whole.to_pylist()
    assert [row["format"] for row in rows][:5] == ["PNG", "JPEG", "WebP", "PNG", None]
    assert [bool(row["warning"]) for row in rows] == [False, False, False, True, False, False]
    assert rows[4]["status"] == "error" and {rows[4][name] for name in MEDIA} == {None}
    assert {rows[0][name] for name in MEDIA[4:]} == {None} and rows[5]["codec"]
    for file in sorted((output / "data").iterdir())[1:]:
        file.unlink()
    assert run().select(["warning", *MEDIA]).equals(whole.select(["warning", *MEDIA]))
    page = Path(write_report(ReportOptions(str(output))).report).read_text()
    assert "partial image" in page and '"duration_s"' in page


def test_an_annotation_has_the_columns_after_those_of_its_tasks(tmp_path: Path) -> None:
    names = make_annotate_config("in", tmp_path, media_columns=True).questionnaire.schema.names
    assert names[-len(MEDIA) :] == MEDIA and names[-len(MEDIA) - 1] == "round_confidence"


def test_without_the_options_the_columns_are_those_of_the_schema() -> None:
    assert make_job_config(["in"], "out").questionnaire.schema == schema.OUTPUT


def test_a_kept_column_of_the_same_name_is_refused() -> None:
    with pytest.raises(ValueError, match="already has width"):
        make_job_config(["in"], "out", media_columns=True, keep_columns=("width",))
