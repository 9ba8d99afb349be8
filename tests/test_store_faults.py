"""Occasional faults of a store only cost time; a store that is down stops the run and marks no row as bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem

from pipelines.config import CaptionConfig
from pipelines.errors import StoreFault
from pipelines.media.fetch import Fetcher
from pipelines.media.reference import FileRef, parse_reference
from pipelines.rows import PreparedRow
from pipelines.sources import list_rows
from pipelines.storage import store
from tests.support.faulty_store import Faults, FaultyStore
from tests.support.golden_data import checkpoint_dir
from tests.support.parquet_files import HF, write
from tests.support.pictures import encode_picture
from tests.support.processes import run_caption
from tests.support.stages import make_stage, run_stage
from tests.support.tars import write_tar

MODEL = str(checkpoint_dir("tiny56-tied"))


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyStore]:
    server = FaultyStore()
    yield server
    server.close()


@pytest.fixture
def s3(server: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """Create an empty bucket, configured by the environment, with short pauses and few retries by the client itself."""
    for name, value in {**server.to_environment(), "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # fsspec caches file systems with the environment of their first use
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(store, "RETRIES", replace(store.RETRIES, first_pause_s=0.001))
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    yield fs
    fs.rm("bucket", recursive=True)
    S3FileSystem.clear_instance_cache()


def test_every_read_and_write_of_a_failing_store_is_retried(server: FaultyStore, s3: fsspec.AbstractFileSystem) -> None:
    with server.inject(Faults(share=0.3, kinds=("error", "cut"))) as faults:
        for i in range(8):
            store.write_bytes(f"s3://bucket/{i}", bytes([i]) * 1000)
        assert [store.read_bytes(f"s3://bucket/{i}") for i in range(8)] == [bytes([i]) * 1000 for i in range(8)]
        assert [store.read_bytes(f"s3://bucket/{i}", 5, 9) for i in range(8)] == [bytes([i]) * 4 for i in range(8)]
        assert len(store.list_files("s3://bucket")) == 8
        with store.open_file("s3://bucket/7", block_bytes=100) as file:
            assert file.read(10) + file.read() == bytes([7]) * 1000
        store.move("s3://bucket/7", "s3://bucket/moved")
        assert store.find_file("s3://bucket/7") is None
    assert faults.num_faults > 8


def test_shards_are_read_completely_despite_faults(
    server: FaultyStore, s3: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    images = [{"bytes": encode_picture(i), "path": None} for i in range(40)]
    s3.put_file(
        str(write(tmp_path / "a.parquet", {"image": __import__("pyarrow").array(images, HF)})), "bucket/a.parquet"
    )
    s3.put_file(
        str(write_tar(tmp_path / "b.tgz", [(f"{i}.png", encode_picture(i)) for i in range(40)], "w:gz")), "bucket/b.tgz"
    )
    with server.inject(Faults(share=0.3, kinds=("error", "cut"))) as faults:
        config = CaptionConfig(input=("s3://bucket/a.parquet", "s3://bucket/b.tgz"), output="out", model="demo")
        with list_rows(config, config.questionnaire) as listing:
            rows = [row for table in listing.read_tables() for row in table.to_pylist()]
        fetcher = Fetcher()
        data = [fetcher.submit([parse_reference(image) for image in row["images"]]).result() for row in rows]
    assert data == [[encode_picture(i)] for i in range(40)] * 2
    assert faults.num_faults > 0


def test_a_store_that_is_down_raises_a_store_fault(server: FaultyStore, s3: fsspec.AbstractFileSystem) -> None:
    s3.pipe_file("bucket/a.png", encode_picture(0))
    with server.inject(Faults(share=1.0)):
        with pytest.raises(StoreFault, match="still fails after all retries"):
            store.read_bytes("s3://bucket/a.png")
        with pytest.raises(StoreFault):
            Fetcher().submit([FileRef("s3://bucket/a.png", num_bytes=5)]).result()
    with pytest.raises(FileNotFoundError):
        store.read_bytes("s3://bucket/b.png")


def prepare_rows(output: Path, server: FaultyStore, faults: Faults) -> list[PreparedRow]:
    """Prepare twelve rows in the CPU stage while the store injects the faults."""
    stage, units = make_stage(CaptionConfig(input=("s3://bucket/in",), output=str(output), model=MODEL))
    with server.inject(faults):
        return run_stage(stage, units)


@pytest.fixture
def pictures(s3: fsspec.AbstractFileSystem) -> fsspec.AbstractFileSystem:
    for i in range(12):
        s3.pipe_file(f"bucket/in/{i:02}.png", encode_picture(i))
    return s3


def test_a_file_that_fails_while_others_are_read_is_an_error_row(
    server: FaultyStore, pictures: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    """Other files of the store are read, so the file is at fault; retrying it forever would never end the run."""
    rows = prepare_rows(tmp_path, server, Faults(broken=("in/07.png", "in/00.png")))
    assert [row.stage == "read" for row in rows] == [i in (0, 7) for i in range(12)]
    assert "other files can be read" in str(rows[7].error)


def test_a_store_that_is_down_stops_the_stage_without_error_rows(
    server: FaultyStore, pictures: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    with pytest.raises(StoreFault):
        prepare_rows(tmp_path, server, Faults(broken=("in/",)))


@pytest.mark.slow
def test_a_run_whose_store_goes_down_stops_and_is_resumed(
    server: FaultyStore, pictures: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    """Takes about two minutes, the time for which the store is retried."""
    arguments = ["s3://bucket/in", tmp_path / "out", "--model", MODEL, "--max-new-tokens", 2]
    with server.inject(Faults(broken=("in/",))):
        stopped = run_caption(*arguments, timeout_s=400)
    assert stopped.exit_code == 1, stopped.stderr
    assert "the store fails" in stopped.stderr and "the same command" in stopped.stderr
    finished = run_caption(*arguments)
    assert (finished.exit_code, finished.summary["ok"], finished.summary["error"]) == (0, 12, 0)
