"""Every kind of input, local and in S3: each row comes out once, with a unique id, its columns and one schema."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3fs import S3FileSystem

from pipelines import schema
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.buckets import BUCKET
from tests.support.fake_engine import FakeEngineFactory
from tests.support.job_configs import make_job_config
from tests.support.jsonl_files import write_lines
from tests.support.parquet_files import HF, make_kept_columns, write
from tests.support.pictures import encode_picture
from tests.support.tars import write_tar

NUM_ROWS = 12


def make_files(directory: Path) -> dict[str, pa.Array]:
    for i in range(NUM_ROWS):
        (directory / f"{i:02}.png").write_bytes(encode_picture(i))
    return {}


def make_tar(directory: Path) -> dict[str, pa.Array]:
    return write_tar_with_columns(directory / "a.tar", "w")


def make_tgz(directory: Path) -> dict[str, pa.Array]:
    return write_tar_with_columns(directory / "a.tgz", "w:gz")


def write_tar_with_columns(path: Path, mode: str) -> dict[str, pa.Array]:
    members = [(f"{i:02}.png", encode_picture(i)) for i in range(NUM_ROWS)]
    write_tar(path, [*members, *((f"{i:02}.json", json.dumps(make_values(i)).encode()) for i in range(NUM_ROWS))], mode)
    return make_json_columns()


def make_jsonl(directory: Path) -> dict[str, pa.Array]:
    (directory / "images").mkdir()
    for i in range(NUM_ROWS):
        (directory / "images" / f"{i}.bin").write_bytes(encode_picture(i))
    write_lines(directory / "a.jsonl", *({"image": f"images/{i}.bin", **make_values(i)} for i in range(NUM_ROWS)))
    return make_json_columns()


def make_parquet(directory: Path) -> dict[str, pa.Array]:
    columns = {**make_kept_columns(NUM_ROWS), "maybe": pa.array([None, "é"] * (NUM_ROWS // 2))}
    images = pa.array([{"bytes": encode_picture(i), "path": None} for i in range(NUM_ROWS)], HF)
    columns.pop("blob")  # as bytes it could also be the image column
    write(directory / "a.parquet", {"image": images, **columns}, row_group_size=5)
    return columns


def make_dataset(directory: Path) -> dict[str, pa.Array]:
    datasets.disable_progress_bars()
    images = [Image.open(io.BytesIO(encode_picture(i))) for i in range(NUM_ROWS)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    labels = [i % 2 for i in range(NUM_ROWS)]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).save_to_disk(directory, num_shards=2)
    return {"label": pa.array(labels)}


def make_values(i: int) -> dict[str, object]:
    return {"number": i if i % 3 else None, "name": f"é {i}", "box": [i, 0.5], "nested": {"a": [{"b": i}]}}


def make_json_columns() -> dict[str, pa.Array]:
    return {name: pa.array([make_values(i)[name] for i in range(NUM_ROWS)]) for name in make_values(0)}


KINDS: dict[str, tuple[Callable[[Path], dict[str, pa.Array]], ...]] = {
    "files, tar, tar.gz and JSON lines": (make_files, make_tar, make_tgz, make_jsonl),
    "Parquet": (make_parquet,),
    "a saved dataset": (make_dataset,),
}


@pytest.mark.parametrize("kinds", KINDS)
def test_every_local_row_is_captioned_once_with_its_columns(ray_cluster: None, tmp_path: Path, kinds: str) -> None:
    inputs, columns = make_inputs(tmp_path, kinds)
    run_and_check_rows([str(path) for path in inputs], str(tmp_path / "out"), columns)
    check_readers(tmp_path / "out" / "data", columns)


@pytest.mark.parametrize("kinds", KINDS)
def test_every_row_in_s3_is_captioned_once_with_its_columns(
    bucket: S3FileSystem, ray_cluster: None, tmp_path: Path, kinds: str
) -> None:
    inputs, columns = make_inputs(tmp_path, kinds)
    bucket.put(str(tmp_path), "bucket/work", recursive=True)
    work = f"{BUCKET}/work/{tmp_path.name}" if bucket.isdir(f"bucket/work/{tmp_path.name}") else f"{BUCKET}/work"
    uris = [f"{work}/{path.relative_to(tmp_path)}" for path in inputs]
    run_and_check_rows(uris, f"{BUCKET}/out", columns)
    bucket.get("bucket/out/data/", str(tmp_path / "data"), recursive=True)
    check_readers(tmp_path / "data", columns)


def make_inputs(directory: Path, kinds: str) -> tuple[list[Path], dict[str, pa.Array]]:
    """Make one INPUT of NUM_ROWS rows for each of `kinds`, and return them with the concatenated columns of all."""
    inputs, tables = [], []
    for make in KINDS[kinds]:
        (directory / make.__name__).mkdir()
        tables.append(make(directory / make.__name__))
        inputs.append(directory / make.__name__)
    if kinds.endswith("lines"):
        inputs[-1] /= "a.jsonl"  # the directory also holds its images
    names = tables[-1]
    return inputs, {n: pa.concat_arrays([t.get(n, pa.nulls(NUM_ROWS, names[n].type)) for t in tables]) for n in names}


def run_and_check_rows(inputs: list[str], output: str, columns: dict[str, pa.Array]) -> None:
    options = {"rows_per_file": 7, "keep_columns": tuple(columns), "image_column": None}
    summary = run_pipeline(make_job_config(inputs, output, **options), make_engine=FakeEngineFactory())
    results = read_results(output)
    assert summary.rows == len(results) == NUM_ROWS * len(inputs) == len(set(results.column("id").to_pylist()))
    assert set(results.column("status").to_pylist()) == {"ok"}
    for name, values in columns.items():
        assert results.schema.field(name).type == values.type
        assert results.column(name).to_pylist() == values.to_pylist(), name


def check_readers(data: Path, columns: dict[str, pa.Array]) -> None:
    """Check that PyArrow, pandas, DuckDB and datasets each read every row once."""
    files = sorted(data.glob("*.parquet"))
    whole = pa.schema([*schema.OUTPUT, *((name, values.type) for name, values in columns.items())])
    assert len(files) > 1 and all(pq.read_schema(file).equals(whole) for file in files)
    table = pyarrow.dataset.dataset(data).to_table()
    ids = sorted(table.column("id").to_pylist())
    assert sorted(pd.read_parquet(data)["id"]) == ids
    relation = duckdb.sql(f"select * from read_parquet('{data}/*.parquet') order by id")
    assert relation.columns == whole.names and relation.to_arrow_table().column("id").to_pylist() == ids
    loaded = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(data.parent / "cache"))
    assert sorted(loaded["id"]) == ids and loaded.column_names == whole.names
