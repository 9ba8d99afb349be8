"""The CPU stage as plain Python: no Ray, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ovis_model.types import IMAGE_START_ID
from pipelines import preprocess
from pipelines.cluster.attempts import GIVEN_UP
from pipelines.config import CaptionConfig
from pipelines.media.fetch import Fetcher
from pipelines.media.reference import FileRef
from pipelines.output.ledger import RowRange
from pipelines.output.manifest import read_rows
from pipelines.preprocess import Preprocess
from pipelines.rows import Batch, ManifestRow, PreparedRow
from pipelines.storage import store
from tests.support.golden_data import checkpoint_dir
from tests.support.roots import ROOT
from tests.support.stages import make_stage, run_stage

MODEL = str(checkpoint_dir("tiny112-untied"))


def prepare_rows(directory: Path, output: Path, **options: object) -> list[PreparedRow]:
    """Return the prepared rows of all images in `directory`."""
    return run_stage(*make_preprocess(directory, output, **options))


def make_preprocess(directory: Path, output: Path, **options: object) -> tuple[Preprocess, Batch]:
    config = CaptionConfig(input=(str(directory),), output=str(output), model=MODEL, **options)  # type: ignore[arg-type]
    return make_stage(config)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    directory = tmp_path / "pictures"
    directory.mkdir()
    for i in range(40):
        Image.new("RGB", (200, 150 + i), (i, 2 * i, 3 * i)).save(directory / f"{i:02}.png")
    return directory


def test_rows_keep_their_order_and_their_numbers(pictures: Path, tmp_path: Path) -> None:
    rows = prepare_rows(pictures, tmp_path / "out")
    assert [row.row for row in rows] == list(range(40))
    assert [Path(str(row.uri)).name for row in rows] == [f"{i:02}.png" for i in range(40)]
    assert {row.stage for row in rows} == {""}


def test_batches_are_bounded_in_bytes(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 1_000_000)
    stage, units = make_preprocess(pictures, tmp_path / "out")
    sizes = [sum(tiles.nbytes for tiles in batch["tiles"]) for batch in stage(units)]
    assert len(sizes) > 3 and max(sizes) <= 1_000_000


def test_chain_of_thought_and_system_prompt_reach_the_prompt(pictures: Path, tmp_path: Path) -> None:
    plain = prepare_rows(pictures, tmp_path / "a")[0]
    reasoned = prepare_rows(pictures, tmp_path / "b", chain_of_thought=True)[0]
    instructed = prepare_rows(pictures, tmp_path / "c", system_prompt="Be brief.")[0]
    assert "step-by-step" in str(reasoned.prompt)
    lengths = [len(row.requests[0].input_ids) for row in (plain, reasoned, instructed)]  # type: ignore[arg-type]
    assert lengths[1] > lengths[0] != lengths[2]


def test_a_file_over_the_size_limit_is_an_error_row(pictures: Path, tmp_path: Path) -> None:
    stage, units = make_preprocess(pictures, tmp_path / "out")
    stage._fetcher = Fetcher(max_image_bytes=100)
    rows = run_stage(stage, units)
    assert {row.stage for row in rows} == {"read"}
    assert "over the limit of 100" in str(rows[0].error)


@pytest.mark.parametrize("sizes_are_known", [True, False])
def test_bytes_fetched_ahead_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes_are_known: bool
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i:02}.png").write_bytes(bytes([i]) * 300)
    lines = "\n".join(json.dumps({"image": f"{i:02}.png"}) for i in range(30))
    (tmp_path / "in" / "rows.jsonl").write_text(lines)
    read = store.read_bytes
    num_read = [0]

    def count(uri: str, start: int = 0, stop: int = 0) -> bytes:
        data = read(uri, start, stop)
        num_read[0] += len(data)
        return data

    monkeypatch.setattr(store, "read_bytes", count)
    stage, _ = make_preprocess(tmp_path / "in" / ("*.png" if sizes_are_known else "rows.jsonl"), tmp_path / "out")
    stage._fetcher = Fetcher(max_at_once=10, max_ahead_bytes=1000)
    rows = ManifestRow.from_table(read_rows(str(tmp_path / "out"), RowRange(0, 30)))
    done = 0
    for i, (_, images) in enumerate(stage._fetch_ahead(rows)):
        assert num_read[0] - done <= 1000 + 300
        assert images.result() == [bytes([i]) * 300], "files larger than their share of the limit are read too"
        done = (i + 1) * (300 if sizes_are_known else 300 + 101)
    assert i == 29


def test_the_images_of_a_row_are_bounded_together(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x" * 60)
    fetcher = Fetcher(max_image_bytes=100)
    image = FileRef(str(tmp_path / "a.png"), num_bytes=60)
    assert len(fetcher.fetch([image])) == 1
    with pytest.raises(OSError, match="over the limit of 100"):
        fetcher.submit([image, image]).result()


def test_an_unreadable_file_is_an_error_row(pictures: Path, tmp_path: Path) -> None:
    """The stage runs as a user who may not read the file, also if the tests run as root."""
    (pictures / "00.png").chmod(0)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.owner() == Path(tmp_path).owner() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    script = f"""
import os
from pathlib import Path
from tests.test_preprocess import make_preprocess
stage, units = make_preprocess(Path({str(pictures)!r}), Path({str(tmp_path / "out")!r}))
if os.getuid() == 0:
    os.setuid(65534)
for batch in stage(units):
    for stage_name, error in zip(batch["stage"], batch["error"]):
        print(stage_name, error)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith("read") and "Permission denied" in lines[0]
    assert all(not line.strip() for line in lines[1:]) and len(lines) == 40


def test_a_row_that_kills_its_process_is_the_only_error_row(pictures: Path, tmp_path: Path) -> None:
    """Earlier processes died on the whole unit and on row 7; Ray started each of them for the same unit."""
    stage, units = make_preprocess(pictures, tmp_path / "out")
    for _ in range(2):
        stage._attempts.begin("prepare rows 0 to 40")
    for number in range(7):
        stage._attempts.begin_alone(number)
        stage._attempts.end_alone("prepare rows 0 to 40", number)
    while stage._attempts.begin_alone(7):
        pass
    rows = {row.row: (row.stage, row.error) for row in run_stage(stage, units)}
    assert rows.pop(7) == ("decode", GIVEN_UP)
    assert set(rows.values()) == {("", "")} and len(rows) == 39


def test_files_that_vanish_or_change_are_error_rows(pictures: Path, tmp_path: Path) -> None:
    stage, units = make_preprocess(pictures, tmp_path / "out")
    (pictures / "03.png").unlink()
    (pictures / "04.png").unlink()
    (pictures / "04.png").mkdir()
    os.truncate(pictures / "05.png", 60)
    rows = [(row.stage, row.error) for row in run_stage(stage, units)]
    assert [stage for stage, _ in rows[3:6]] == ["read", "read", "decode"]
    assert all(error for _, error in rows[3:6])
    assert {stage for stage, _ in rows[:3] + rows[6:]} == {""}


@pytest.fixture
def lines(pictures: Path) -> Path:
    """Write rows with three images, with none, with a bad or missing one, and with far too many."""
    (pictures / "bad.png").write_bytes(b"\x89PNG nonsense")
    rows = [
        {"id": "three", "image": ["00.png", "01.png", "02.png"]},
        {"id": "placed", "image": ["00.png", "01.png"], "prompt": "Is <image> like <image>?"},
        {"id": "unplaced", "image": ["00.png", "01.png"], "prompt": "Is <image> one?"},
        {"id": "text", "prompt": "What does <image> mean?"},
        {"id": "bad", "image": ["00.png", "bad.png"]},
        {"id": "missing", "image": ["00.png", "nowhere.png"]},
        {"id": "many", "image": ["00.png"] * 3000},
        {"id": "long", "image": ["00.png"] * 500, "prompt": "word " * 30_000},
    ]
    path = pictures / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_rows_have_any_number_of_images(lines: Path, tmp_path: Path) -> None:
    rows = {row.id: row for row in prepare_rows(lines, tmp_path / "out", max_new_tokens=8)}
    image_starts = {
        id_: sum(list(request.input_ids).count(IMAGE_START_ID) for request in row.requests) for id_, row in rows.items()
    }
    assert {id_: row.num_images for id_, row in rows.items() if not row.stage} == {
        "three": 3,
        "placed": 2,
        "unplaced": 2,
        "text": 0,
    }
    assert [image_starts[id_] for id_ in ("three", "placed", "unplaced", "text")] == [3, 2, 2, 0]
    assert rows["text"].requests[0].tiles.shape == (0, 3, 112, 112)  # type: ignore[attr-defined]
    assert (rows["bad"].stage, rows["missing"].stage) == ("decode", "read")
    assert "image 2 of 2" in str(rows["bad"].error)
    assert (rows["many"].stage, rows["long"].stage) == ("tile", "tile")
    assert "3000 images exceed the model" in str(rows["many"].error)
    assert "over the model's limit" in str(rows["long"].error)


def test_several_images_have_fewer_tiles_each(pictures: Path, tmp_path: Path) -> None:
    large = pictures / "large.png"
    Image.new("RGB", (700, 650)).save(large)
    (pictures / "a.jsonl").write_text('{"image": ["large.png", "large.png", "large.png"]}')
    [one], [three] = prepare_rows(large, tmp_path / "one"), prepare_rows(pictures / "a.jsonl", tmp_path / "three")
    [alike] = prepare_rows(large, tmp_path / "alike", max_tiles=4)
    assert three.num_tiles == 3 * alike.num_tiles < 3 * one.num_tiles
