"""Runs over every kind of INPUT: a row in is a row out, with its columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovis_model.inputs.processor import Processor
from ovis_model.types import Completion, Request, SamplingParams
from pipelines import schema
from pipelines.errors import StageFailed
from pipelines.generate import Replica
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.engines import load_engine
from tests.support.fake_engine import FakeEngine, FakeEngineFactory
from tests.support.job_configs import MODEL, make_job_config
from tests.support.jsonl_files import write_lines
from tests.support.parquet_files import HF, make_kept_columns, write
from tests.support.pictures import encode_picture
from tests.support.processes import OpenCounter, list_files, wait_for
from tests.support.tars import write_tar


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Write a file, tars, Parquet and JSON lines: 40 good rows with labels 1, 2, ... and 6 bad ones."""
    (tmp_path / "file.png").write_bytes(encode_picture(0))
    members = [
        member
        for i in range(1, 21)
        for member in ((f"{i:02}.png", encode_picture(i)), (f"{i:02}.json", json.dumps({"label": i}).encode()))
    ]
    write_tar(tmp_path / "a.tar", [*members[:20:2], *members[1:20:2], ("bad.png", b"no image")])
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:100])
    write_tar(tmp_path / "c.tgz", [*members[20:], ("bad.json", b"{}")], "w:gz")
    images = [{"bytes": encode_picture(i), "path": None} for i in range(21, 31)]
    table = {
        "image": pa.array([*images, None], HF),
        "label": range(21, 32),
        "question": [None, "Why?", *[None] * 9],
    }
    write(tmp_path / "d.parquet", table, row_group_size=4)
    lines = [{"image": "file.png", "label": i} for i in range(31, 38)]
    three = {"image": ["file.png"] * 3, "label": 38}
    write_lines(tmp_path / "e.jsonl", *lines, three, {"question": "2 + 2?", "label": 39}, b"{", {"image": "nowhere"})
    return [tmp_path / name for name in ("file.png", "a.tar", "b.tar", "c.tgz", "d.parquet", "e.jsonl")]


def test_one_run_reads_every_kind_of_input(ray_cluster: None, shards: list[Path], tmp_path: Path) -> None:
    options = {"keep_columns": ("label",), "prompt_column": "question", "rows_per_file": 7}
    summary = run_pipeline(make_job_config(shards, tmp_path / "out", **options), make_engine=FakeEngineFactory())
    rows = read_results(str(tmp_path / "out")).to_pylist()
    ids = [row["id"] for row in rows]
    assert summary.rows == len(rows) == len(set(ids)) == 46
    assert (summary.ok, summary.error) == (40, 6)
    good = [row for row in rows if row["status"] == "ok"]
    assert [row["label"] for row in good] == [None, *range(1, 40)]
    assert [row["num_images"] for row in good] == [1] * 38 + [3, 0]
    assert good[38]["num_tiles"] == 3 * good[0]["num_tiles"] and good[39]["num_tiles"] == 0
    assert [row["prompt"] for row in good if row["prompt"] != "Describe the image."] == ["Why?", "2 + 2?"]
    errors = [(Path(row["uri"]).name, row["stage"]) for row in rows if row["status"] == "error"]
    assert errors == [
        ("a.tar", "decode"),
        ("b.tar", "list"),
        ("c.tgz", "list"),
        ("d.parquet", "read"),
        ("e.jsonl", "list"),
        ("nowhere", "read"),
    ]
    assert {row["id"]: row["label"] for row in rows}[f"{tmp_path}/d.parquet#10"] == 31  # also for rows that fail
    wanted = pa.schema([*schema.OUTPUT, ("label", pa.int64())])
    assert all(pq.read_schema(file).equals(wanted) for file in (tmp_path / "out" / "data").iterdir())


def test_kept_columns_keep_their_types_to_the_output(ray_cluster: None, tmp_path: Path) -> None:
    columns = make_kept_columns(20)
    table = {"image": [encode_picture(i) for i in range(19)] + [b"bad"], **columns}
    write(tmp_path / "a.parquet", table, row_group_size=6)
    options = {"image_column": "image", "keep_columns": tuple(columns), "rows_per_file": 6}
    run_pipeline(
        make_job_config([tmp_path / "a.parquet"], tmp_path / "out", **options), make_engine=FakeEngineFactory()
    )
    results = read_results(str(tmp_path / "out"))
    assert results.select(list(columns)).to_pylist() == pa.table(columns).to_pylist()
    wanted = pa.schema([*schema.OUTPUT, *pa.table(columns).schema])
    files = list((tmp_path / "out" / "data").iterdir())
    assert len(files) >= 4 and all(pq.read_schema(file).equals(wanted) for file in files)


@dataclass(frozen=True)
class DiesOnce(FakeEngineFactory):
    """Makes an engine that raises at its third call, after a file is in OUTPUT; the file `calls` counts the calls."""

    calls: Path = Path()
    output: Path = Path()

    def __call__(self, replica: Replica) -> FakeEngine:
        return DyingEngine(self)


class DyingEngine(FakeEngine):
    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        factory: Any = self._factory
        with self._lock:  # several threads call it
            with factory.calls.open("a") as file:
                file.write("call\n")
            number = len(factory.calls.read_text().splitlines())
        if number == 3:
            wait_for(lambda: bool(list_files(factory.output)), 100)
            raise RuntimeError("out of luck")
        return super().generate(requests, params)


def test_a_run_that_died_is_resumed(ray_cluster: None, shards: list[Path], tmp_path: Path) -> None:
    options = {"keep_columns": ("label",), "prompt_column": "question", "rows_per_file": 4}
    dying = DiesOnce(calls=tmp_path / "calls", output=tmp_path / "out")
    with pytest.raises(StageFailed):
        run_pipeline(make_job_config(shards, tmp_path / "out", **options), make_engine=dying)
    done = len(read_results(str(tmp_path / "out")))
    assert 0 < done < 46
    summary = run_pipeline(make_job_config(shards, tmp_path / "out", **options), make_engine=FakeEngineFactory())
    assert (summary.rows, summary.skipped_done) == (46, done)
    run_pipeline(make_job_config(shards, tmp_path / "whole", **options), make_engine=FakeEngineFactory())
    resumed, whole = (read_results(str(tmp_path / name)).to_pylist() for name in ("out", "whole"))
    assert repr(resumed) == repr(whole)  # repr, for NaN


def test_resume_opens_only_shards_with_missing_rows(ray_cluster: None, shards: list[Path], tmp_path: Path) -> None:
    options = {"prompt_column": "question", "rows_per_file": 7}
    run_pipeline(make_job_config(shards, tmp_path / "out", **options), make_engine=FakeEngineFactory())
    whole = read_results(str(tmp_path / "out")).to_pylist()
    max((tmp_path / "out" / "data").iterdir()).unlink()
    done = {row["id"] for row in read_results(str(tmp_path / "out")).to_pylist()}
    needed = {Path(row["uri"]).name for row in whole if row["id"] not in done}
    with OpenCounter(tmp_path) as counter:
        run_pipeline(make_job_config(shards, tmp_path / "out", **options), make_engine=FakeEngineFactory())
    assert 0 < len(done) < 46 and not needed & {"a.tar", "b.tar"}
    assert counter.opens.keys() <= needed
    assert repr(read_results(str(tmp_path / "out")).to_pylist()) == repr(whole)


def test_rows_without_images_are_answered_alone_and_in_a_batch_with_images() -> None:
    processor, image = Processor.from_pretrained(MODEL), Image.new("RGB", (90, 60), "red")
    requests = [processor.build_request("2 + 2?", images) for images in ([], [image], [image] * 3)]
    params = SamplingParams(max_new_tokens=4)
    together = load_engine("tiny56-tied").generate(requests, params)
    [alone] = load_engine("tiny56-tied").generate(requests[:1], params)
    assert together[0].output_ids.tolist() == alone.output_ids.tolist() != []


def test_a_run_with_other_kept_columns_is_refused(ray_cluster: None, shards: list[Path], tmp_path: Path) -> None:
    engine = FakeEngineFactory()
    run_pipeline(make_job_config(shards[-1:], tmp_path / "out", keep_columns=("label",)), make_engine=engine)
    with pytest.raises(ValueError, match="keep-columns"):
        run_pipeline(make_job_config(shards[-1:], tmp_path / "out"), make_engine=engine)
