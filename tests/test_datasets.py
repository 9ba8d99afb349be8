"""Datasets saved by Hugging Face's library give the same rows in every layout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.errors import SourceError
from pipelines.media.fetch import Fetcher
from pipelines.media.reference import parse_reference
from tests.support.jsonl_files import write_lines
from tests.support.pictures import encode_picture
from tests.support.rows import Row, list_input

NUM_ROWS = 25


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def dataset() -> datasets.Dataset:
    columns = {
        "picture": [Image.open(io.BytesIO(encode_picture(i))) for i in range(NUM_ROWS)],
        "label": [i % 3 for i in range(NUM_ROWS)],
        "question": [f"Is it {i}?" for i in range(NUM_ROWS)],
    }
    label = datasets.ClassLabel(names=["a", "b", "c"])
    features = {"picture": datasets.Image(), "label": label, "question": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def read_colours(rows: list[Row]) -> list[Any]:
    """Return the colour of each image's first pixel; the library re-encodes images, so bytes differ."""
    fetcher = Fetcher()
    images = [fetcher.submit([parse_reference(image) for image in row["images"]]).result() for row in rows]
    return [Image.open(io.BytesIO(data)).getpixel((0, 0)) for [data] in images]


COLOURS = [Image.open(io.BytesIO(encode_picture(i))).getpixel((0, 0)) for i in range(NUM_ROWS)]


@pytest.mark.parametrize("layout", ["save_to_disk", "save_to_disk in shards", "hub", "cache"])
def test_every_layout_gives_the_same_rows(dataset: datasets.Dataset, tmp_path: Path, layout: str) -> None:
    directory = tmp_path / "dataset"
    if layout.startswith("save_to_disk"):
        dataset.save_to_disk(directory, num_shards=3 if "shards" in layout else 1)
    else:
        (directory / "data").mkdir(parents=True)
        (directory / "README.md").write_text("---\nlicense: mit\n---\n")
        for i in range(2):
            dataset.shard(2, i, contiguous=True).to_parquet(directory / "data" / f"train-0000{i}-of-00002.parquet")
    if layout == "cache":
        datasets.load_dataset(str(directory), cache_dir=str(tmp_path / "cache"))
        directory = tmp_path / "cache"
    rows = list_input(directory, prompt_column="question", keep_columns=("label",))
    assert read_colours(rows) == COLOURS
    assert [row["prompt"] for row in rows] == [f"Is it {i}?" for i in range(NUM_ROWS)]
    assert [row["kept"]["label"] for row in rows] == [i % 3 for i in range(NUM_ROWS)]
    assert len({row["id"] for row in rows}) == NUM_ROWS and all("#" in row["id"] for row in rows)
    assert read_colours(rows[::-1]) == COLOURS[::-1]


def test_a_dataset_is_read_whole_or_by_split(dataset: datasets.Dataset, tmp_path: Path) -> None:
    splits = {"train": dataset, "test": dataset.select(range(5))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    assert read_colours(list_input(tmp_path / "d")) == COLOURS + COLOURS[:5]
    assert read_colours(list_input(tmp_path / "d" / "test")) == COLOURS[:5]
    assert read_colours(list_input(tmp_path / "d" / "test" / "*.arrow")) == COLOURS[:5]


def test_a_dataset_in_a_store_is_read(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "d", num_shards=2)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "d"), "/datasets/d", recursive=True)
    rows = list_input("memory://datasets/d", keep_columns=("label",))
    assert read_colours(rows) == COLOURS and rows[0]["uri"].startswith("memory://")


def test_a_dataset_with_a_missing_file_is_refused(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "d", num_shards=2)
    (tmp_path / "d" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match=r"data-00001-of-00002\.arrow"):
        list_input(tmp_path / "d")


@pytest.mark.parametrize("keep", [10, 600, 0])
def test_an_arrow_stream_without_rows_is_refused(dataset: datasets.Dataset, tmp_path: Path, keep: int) -> None:
    with pytest.raises(SourceError, match="as an Arrow stream"):
        list_input(truncate_stream(dataset, tmp_path, keep))


@pytest.mark.parametrize("keep", [-4, -8])
def test_a_truncated_arrow_stream_ends_with_an_error_row(dataset: datasets.Dataset, tmp_path: Path, keep: int) -> None:
    *rows, last = list_input(truncate_stream(dataset, tmp_path, keep))
    assert len(rows) == len(dataset) and not any(row["error"] for row in rows)
    assert "as an Arrow stream" in last["error"] and not last["images"]


def truncate_stream(dataset: datasets.Dataset, tmp_path: Path, keep: int) -> Path:
    """Save the dataset and keep the first bytes of its file, all but the last ones if `keep` is negative."""
    dataset.save_to_disk(tmp_path / "d")
    [path] = (tmp_path / "d").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:keep])
    return path


def test_an_arrow_file_of_several_batches_is_read(tmp_path: Path) -> None:
    table = pa.table({"image": [bytes([i]) for i in range(30)], "n": range(30)})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    rows = list_input(tmp_path / "a.arrow", keep_columns=("n",))
    fetcher = Fetcher()
    data = [fetcher.submit([parse_reference(image) for image in row["images"]]).result() for row in rows]
    assert data == [[bytes([i])] for i in range(30)]
    assert len({row["images"][0]["offset"] for row in rows}) == 5


def test_dictionary_encoded_columns_are_refused(tmp_path: Path) -> None:
    table = pa.table({"image": [b"1"], "n": pa.array(["a"]).dictionary_encode()})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(SourceError, match="save the dataset as Parquet"):
        list_input(tmp_path / "a.arrow")


def test_an_image_folder_is_read_through_its_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(4):
            (tmp_path / split / f"{i}.png").write_bytes(encode_picture(i))
        lines = [{"file_name": f"{i}.png", "about": f"{split} {i}"} for i in range(3)]
        write_lines(tmp_path / split / "metadata.jsonl", *lines)
    (tmp_path / "cover.png").write_bytes(encode_picture(9))
    rows = list_input(tmp_path, keep_columns=("about",))
    assert [Path(row["uri"]).name for row in rows] == ["cover.png", *["0.png", "1.png", "2.png"] * 2]
    assert [row["kept"]["about"] for row in rows] == [None, *(f"{s} {i}" for s in ("test", "train") for i in range(3))]
    assert "8 images are listed through the rows of metadata.jsonl" in caplog.text
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(SourceError, match=r"metadata\.csv.*metadata\.jsonl"):
        list_input(tmp_path)


def test_a_directory_of_shards_of_one_kind_is_read(tmp_path: Path) -> None:
    for i in range(2):
        write_lines(tmp_path / f"{i}.jsonl", {"prompt": f"What is {i}?"})
    (tmp_path / "notes.md").touch()
    assert [row["prompt"] for row in list_input(tmp_path)] == ["What is 0?", "What is 1?"]
    (tmp_path / "a.tar").touch()
    with pytest.raises(SourceError, match=r"\(jsonl, tar\)"):
        list_input(tmp_path)


def test_a_foreign_state_json_does_not_make_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_picture(0))
    for content in ("not JSON", "[]", json.dumps({"_data_files": 3})):
        (tmp_path / "state.json").write_text(content)
        assert len(list_input(tmp_path)) == 1
