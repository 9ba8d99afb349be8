"""Every kind of input, local and in an S3 store: rows out are rows in, ids once, columns as they were, one schema."""

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


def _files(directory: Path) -> dict[str, pa.Array]:
    for i in range(NUM_ROWS):
        (directory / f"{i:02}.png").write_bytes(encode_picture(i))
    return {}


def _tar(directory: Path) -> dict[str, pa.Array]:
    return _any_tar(directory / "a.tar", "w")


def _tgz(directory: Path) -> dict[str, pa.Array]:
    return _any_tar(directory / "a.tgz", "w:gz")


def _any_tar(path: Path, mode: str) -> dict[str, pa.Array]:
    members = [(f"{i:02}.png", encode_picture(i)) for i in range(NUM_ROWS)]
    write_tar(path, [*members, *((f"{i:02}.json", json.dumps(_values(i)).encode()) for i in range(NUM_ROWS))], mode)
    return _json_columns()


def _jsonl(directory: Path) -> dict[str, pa.Array]:
    (directory / "images").mkdir()
    for i in range(NUM_ROWS):
        (directory / "images" / f"{i}.bin").write_bytes(encode_picture(i))
    write_lines(directory / "a.jsonl", *({"image": f"images/{i}.bin", **_values(i)} for i in range(NUM_ROWS)))
    return _json_columns()


def _parquet(directory: Path) -> dict[str, pa.Array]:
    columns = {**make_kept_columns(NUM_ROWS), "maybe": pa.array([None, "é"] * (NUM_ROWS // 2))}
    images = pa.array([{"bytes": encode_picture(i), "path": None} for i in range(NUM_ROWS)], HF)
    columns.pop("blob")  # it would be taken for images too
    write(directory / "a.parquet", {"image": images, **columns}, row_group_size=5)
    return columns


def _dataset(directory: Path) -> dict[str, pa.Array]:
    datasets.disable_progress_bars()
    images = [Image.open(io.BytesIO(encode_picture(i))) for i in range(NUM_ROWS)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    labels = [i % 2 for i in range(NUM_ROWS)]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).save_to_disk(directory, num_shards=2)
    return {"label": pa.array(labels)}


def _values(i: int) -> dict[str, object]:
    return {"number": i if i % 3 else None, "name": f"é {i}", "box": [i, 0.5], "nested": {"a": [{"b": i}]}}


def _json_columns() -> dict[str, pa.Array]:
    return {name: pa.array([_values(i)[name] for i in range(NUM_ROWS)]) for name in _values(0)}


KINDS: dict[str, tuple[Callable[[Path], dict[str, pa.Array]], ...]] = {
    "files, tar, tar.gz and JSON lines": (_files, _tar, _tgz, _jsonl),
    "Parquet": (_parquet,),
    "a saved dataset": (_dataset,),
}


@pytest.mark.parametrize("kinds", KINDS)
def test_local(ray_cluster: None, tmp_path: Path, kinds: str) -> None:
    inputs, columns = make_inputs(tmp_path, kinds)
    conserve([str(path) for path in inputs], str(tmp_path / "out"), columns)
    check_readers(tmp_path / "out" / "data", columns)


@pytest.mark.parametrize("kinds", KINDS)
def test_s3(bucket: S3FileSystem, ray_cluster: None, tmp_path: Path, kinds: str) -> None:
    inputs, columns = make_inputs(tmp_path, kinds)
    bucket.put(str(tmp_path), "bucket/work", recursive=True)
    work = f"{BUCKET}/work/{tmp_path.name}" if bucket.isdir(f"bucket/work/{tmp_path.name}") else f"{BUCKET}/work"
    uris = [f"{work}/{path.relative_to(tmp_path)}" for path in inputs]
    conserve(uris, f"{BUCKET}/out", columns)
    bucket.get("bucket/out/data/", str(tmp_path / "data"), recursive=True)
    check_readers(tmp_path / "data", columns)


def make_inputs(directory: Path, kinds: str) -> tuple[list[Path], dict[str, pa.Array]]:
    """INPUTs of NUM_ROWS rows each, and the columns of them all."""
    inputs, tables = [], []
    for make in KINDS[kinds]:
        (directory / make.__name__).mkdir()
        tables.append(make(directory / make.__name__))
        inputs.append(directory / make.__name__)
    if kinds.endswith("lines"):
        inputs[-1] /= "a.jsonl"  # beside its images
    names = tables[-1]
    return inputs, {n: pa.concat_arrays([t.get(n, pa.nulls(NUM_ROWS, names[n].type)) for t in tables]) for n in names}


def conserve(inputs: list[str], output: str, columns: dict[str, pa.Array]) -> None:
    options = {"rows_per_file": 7, "keep_columns": tuple(columns), "image_column": None}
    summary = run_pipeline(make_job_config(inputs, output, **options), make_engine=FakeEngineFactory())
    results = read_results(output)
    assert summary.rows == len(results) == NUM_ROWS * len(inputs) == len(set(results.column("id").to_pylist()))
    assert set(results.column("status").to_pylist()) == {"ok"}
    for name, values in columns.items():
        assert results.schema.field(name).type == values.type
        assert results.column(name).to_pylist() == values.to_pylist(), name


def check_readers(data: Path, columns: dict[str, pa.Array]) -> None:
    """What people read it with: all see every row once."""
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
