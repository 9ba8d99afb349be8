"""Several drivers each do a part of one list of rows; what they write is read together."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import CaptionConfig
from pipelines.errors import RunError
from pipelines.output.compact import compact_run
from pipelines.output.lease import Lease
from pipelines.output.parts import list_output_parts, open_part, prepare_list, read_whole_record
from pipelines.output.run_record import open_run
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from pipelines.report.build import ReportOptions, write_report
from pipelines.sources import list_rows
from tests.support.clusters import RayHead
from tests.support.fake_engine import FakeEngineFactory
from tests.support.jsonl_files import write_lines
from tests.support.pictures import draw
from tests.support.processes import Job
from tests.support.roots import ROOT

NUM_ROWS = 14


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "in.jsonl", *({"id": f"row {i}", "image": f"{i}.png", "label": i} for i in range(NUM_ROWS))
    )


def make_config(inputs: Path, tmp_path: Path, shard: str | None = None, **options: object) -> CaptionConfig:
    values = {"id_column": "id", "keep_columns": ("label",), **options}
    return CaptionConfig(
        input=(str(inputs),),
        output=str(tmp_path / "out"),
        model="demo",
        shard=shard,
        **values,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("count", [1, 3, NUM_ROWS])
def test_each_row_is_in_one_part_in_the_order_of_the_input(inputs: Path, tmp_path: Path, count: int) -> None:
    ids: list[str] = []
    for index in range(1, count + 1):
        part, rows = open_part(make_config(inputs, tmp_path, f"{index}/{count}"))
        assert part.first_row == len(ids)
        tables = list(rows.read_tables())
        assert sum(map(len, tables)) == rows.num_rows > 0
        ids += [id_ for table in tables for id_ in table.column("id").to_pylist()]
        assert rows.kept.names == ["label"]
    assert ids == [f"row {i}" for i in range(NUM_ROWS)]


def test_a_list_made_beforehand_is_not_made_again(inputs: Path, tmp_path: Path) -> None:
    assert prepare_list(make_config(inputs, tmp_path)).num_rows == NUM_ROWS
    inputs.unlink()
    assert open_part(make_config(inputs, tmp_path, "2/2"))[1].num_rows == NUM_ROWS // 2


def test_the_driver_that_comes_second_waits_for_the_list(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipelines.output.parts._LOOK_S", 0.05)
    first = Lease(str(tmp_path / "out"))
    first.__enter__()
    threading.Timer(0.5, first.__exit__).start()
    assert open_part(make_config(inputs, tmp_path, "1/2"))[1].num_rows == NUM_ROWS // 2
    assert "another driver lists the rows" in caplog.text


@pytest.mark.parametrize(
    ("shard", "options", "message"),
    [
        ("1/3", {}, "is divided into 2 parts, not 3; give --shard I/2"),
        ("1/2", {"max_tiles": 1}, "was listed with another max_tiles"),
        ("1/2", {"limit": 3}, "was listed with another limit"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    inputs: Path, tmp_path: Path, shard: str, options: dict[str, object], message: str
) -> None:
    open_part(make_config(inputs, tmp_path, "2/2"))
    with pytest.raises(RunError, match=message):
        open_part(make_config(inputs, tmp_path, shard, **options))


def test_outputs_of_one_and_of_several_drivers_do_not_mix(inputs: Path, tmp_path: Path) -> None:
    open_run(make_config(inputs, tmp_path), {"id": "demo", "revision": None})
    with pytest.raises(RunError, match="holds a run of one driver"):
        open_part(make_config(inputs, tmp_path, "1/2"))
    divided = make_config(inputs, tmp_path).model_copy(update={"output": str(tmp_path / "divided")})
    prepare_list(divided)
    with pytest.raises(RunError, match="give --shard I/N"):
        run_pipeline(divided)
    with pytest.raises(RunError, match="14 rows would be empty; use at most 14 parts"):
        open_part(divided.model_copy(update={"shard": "15/15"}))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_part_that_does_not_exist_is_refused(inputs: Path, tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match="shard"):
        make_config(inputs, tmp_path, shard)


def test_an_s3_inventory_becomes_an_input(tmp_path: Path) -> None:
    """The page's SQL turns the columns of an inventory into URIs."""
    [sql] = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "operate.md").read_text(), re.DOTALL)
    keys = [f"photos/{i}.jpg" for i in range(3)]
    pq.write_table(pa.table({"bucket": ["b"] * 4, "key": [*keys, "photos/list.txt"]}), tmp_path / "inventory.parquet")
    for place, name in (("s3://inventory/data/*.parquet", "inventory"), ("s3://bucket/inventory.parquet", "in")):
        sql = sql.replace(place, str(tmp_path / f"{name}.parquet"))
    duckdb.execute(sql)
    config = CaptionConfig(input=(str(tmp_path / "in.parquet"),), output=str(tmp_path / "out"), model="demo")
    with list_rows(config, config.questionnaire) as listing:
        assert listing.num_rows == 3
        [table] = listing.read_tables()
    assert [row[0]["uri"] for row in table.column("images").to_pylist()] == [f"s3://b/{key}" for key in keys]


def draw_pictures(inputs: Path) -> None:
    for i in range(NUM_ROWS):
        draw(inputs.parent / f"{i}.png", seed=i)


def start_drivers(inputs: Path, output: Path, count: int, address: str) -> list[Job]:
    options = ("--model", "demo", "--max-new-tokens", "4", "--id-column", "id", "--keep-columns", "label")
    shards = [f"{index}/{count}" for index in range(1, count + 1)]
    return [Job(["jobs.caption", str(inputs), str(output), *options, "--shard", s], address).start() for s in shards]


def check_result(output: Path, count: int) -> None:
    """Read, compact and report all parts together."""
    assert len(list_output_parts(str(output))) == count
    rows = read_results(str(output)).to_pylist()
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(NUM_ROWS)]
    assert [row["label"] for row in rows] == list(range(NUM_ROWS)) and all(row["status"] == "ok" for row in rows)
    record = read_whole_record(str(output))
    assert record is not None
    assert (record["num_rows"], record["status"], len(record["sessions"])) == (NUM_ROWS, "finished", count)
    assert compact_run(str(output), 1 << 20).files_after == count
    assert repr(read_results(str(output)).to_pylist()) == repr(rows)
    report = write_report(ReportOptions(str(output)))
    assert (report.rows, report.ok, report.shown, report.without_media) == (NUM_ROWS, NUM_ROWS, NUM_ROWS, 0)
    page = (output / "report.html").read_text()
    assert page.count('"ended_at"') == count and '"limited_by"' in page, "the report shows the sessions of all parts"
    listed = json.loads((output / "list" / "list.json").read_text())
    assert listed["num_rows"] == NUM_ROWS


def test_two_drivers_at_once_write_one_result(inputs: Path, tmp_path: Path, ray_cluster: None) -> None:
    draw_pictures(inputs)
    configs = [make_config(inputs, tmp_path, shard) for shard in ("1/2", "2/2")]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(run_pipeline, make_engine=FakeEngineFactory()), configs))
    assert sum(summary.rows for summary in found) == NUM_ROWS
    check_result(tmp_path / "out", 2)
    assert run_pipeline(configs[1], make_engine=FakeEngineFactory()).skipped_done == NUM_ROWS // 2


@pytest.mark.slow
def test_four_drivers_at_once_share_a_cluster(inputs: Path, tmp_path: Path) -> None:
    draw_pictures(inputs)
    head = RayHead()
    try:
        finished = [job.finish(400) for job in start_drivers(inputs, tmp_path / "out", 4, head.address)]
    finally:
        head.close()
    assert [job.exit_code for job in finished] == [0] * 4, finished
    assert sum(job.summary["rows"] for job in finished) == NUM_ROWS
    check_result(tmp_path / "out", 4)
