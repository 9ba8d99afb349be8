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
from pipelines.export.options import ExportOptions
from pipelines.export.run import export_run
from pipelines.output.compact import compact_run
from pipelines.output.lease import Lease
from pipelines.output.manifest import read_columns
from pipelines.output.parts import (
    OutputPart,
    extend_list,
    list_output_parts,
    open_part,
    prepare_list,
    read_whole_record,
)
from pipelines.output.run_record import open_run
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from pipelines.report.build import ReportOptions, write_report
from pipelines.row_lists import list_beforehand
from pipelines.sources import list_rows
from tests.support.clusters import RayHead
from tests.support.fake_engine import FakeEngineFactory
from tests.support.jsonl_files import write_lines
from tests.support.pictures import draw
from tests.support.processes import Job
from tests.support.roots import ROOT
from tests.support.videos import draw_shots, write_video

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
        assert part.pieces[0].start == len(ids)
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


def append_lines(inputs: Path, stop: int) -> None:
    """Let INPUT have the rows up to `stop`, the new ones before those that are listed already."""
    lines = [{"id": f"row {i}", "image": f"{i}.png", "label": i} for i in range(stop)]
    write_lines(inputs, *lines[NUM_ROWS:], *lines[:NUM_ROWS])


@pytest.mark.parametrize("count", [1, 3])
def test_an_extended_list_is_divided_again(inputs: Path, tmp_path: Path, count: int) -> None:
    """Rows keep their part and their number; a part that begins later has the new rows too."""
    parts = [make_config(inputs, tmp_path, f"{i}/{count}") for i in range(1, count + 1)]
    before = [open_part(config)[0] for config in parts]
    append_lines(inputs, NUM_ROWS + 5)
    assert open_part(parts[0])[0] == before[0], "a driver does not extend the list by itself"
    assert extend_list(make_config(inputs, tmp_path, extend=True)).num_rows == NUM_ROWS + 5
    assert extend_list(make_config(inputs, tmp_path, extend=True)).num_rows == NUM_ROWS + 5
    ids: dict[int, str] = {}
    for config, earlier in zip(parts, before, strict=True):
        part, rows = open_part(config)
        assert read_numbers(part)[: len(read_numbers(earlier))] == read_numbers(earlier)
        found = [id_ for table in rows.read_tables() for id_ in table.column("id").to_pylist()]
        ids.update(zip(read_numbers(part), found, strict=True))
        new = [id_ for table in rows.skip(len(read_numbers(earlier))).read_tables() for id_ in table["id"].to_pylist()]
        assert new == [id_ for id_ in found if int(id_.split()[1]) >= NUM_ROWS]
    assert [ids[i] for i in range(NUM_ROWS + 5)] == [f"row {i}" for i in range(NUM_ROWS + 5)]


def read_numbers(part: OutputPart) -> list[int]:
    return [number for rows in part.pieces for number in range(*rows)]


def test_a_list_is_extended_by_another_input_only_with_extend(inputs: Path, tmp_path: Path) -> None:
    open_part(make_config(inputs, tmp_path, "1/2"))
    other = write_lines(tmp_path / "more.jsonl", {"id": "new", "image": "new.png", "label": 1})
    config = make_config(inputs, tmp_path).model_copy(update={"input": (str(inputs), str(other))})
    with pytest.raises(RunError, match=r"with another input; .* `ovis2 list INPUT OUTPUT \.\.\. --extend`"):
        open_part(config.model_copy(update={"shard": "1/2"}))
    with pytest.raises(RunError, match=r"with another max_tiles; .* or another OUTPUT$"):
        extend_list(config.model_copy(update={"max_tiles": 1, "extend": True}))
    assert extend_list(config.model_copy(update={"extend": True})).num_rows == NUM_ROWS + 1
    assert open_part(config.model_copy(update={"shard": "2/2"}))[1].num_rows == NUM_ROWS // 2 + 1
    write_lines(other, {"id": "newer", "image": "new.png", "label": "text"})
    config = config.model_copy(update={"input": (str(other),)})
    with pytest.raises(RunError, match="the kept column label is int64 in the run, but string in the new rows"):
        extend_list(config.model_copy(update={"extend": True}))


def test_a_run_that_was_killed_while_it_extended_the_list_is_repeated(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = prepare_list(make_config(inputs, tmp_path))
    append_lines(inputs, NUM_ROWS + 5)
    with monkeypatch.context() as patched:
        patched.setattr(Lease, "check", lambda self: None if next(checks) else self.undefined)
        checks = iter([True, False])
        with pytest.raises(AttributeError):
            extend_list(make_config(inputs, tmp_path, extend=True))
    assert sum(map(len, read_columns(listed.place, 1 << 17, ["id"]))) == NUM_ROWS + 5, "killed between the files"
    assert open_part(make_config(inputs, tmp_path, "1/1"))[1].num_rows == NUM_ROWS
    assert extend_list(make_config(inputs, tmp_path, extend=True)).num_rows == NUM_ROWS + 5
    [table] = read_columns(listed.place, 1 << 17, ["id"])
    assert table["id"].to_pylist() == [f"row {i}" for i in range(NUM_ROWS + 5)]


def test_outputs_of_one_and_of_several_drivers_do_not_mix(inputs: Path, tmp_path: Path) -> None:
    open_run(make_config(inputs, tmp_path), {"id": "demo", "revision": None})
    with pytest.raises(RunError, match="holds a run of one driver"):
        open_part(make_config(inputs, tmp_path, "1/2"))
    divided = make_config(inputs, tmp_path).model_copy(update={"output": str(tmp_path / "divided")})
    prepare_list(divided)
    with pytest.raises(RunError, match="give --shard I/N"):
        run_pipeline(divided)
    with pytest.raises(RunError, match="14 rows cannot be divided into 15 parts; use at most 14 parts"):
        open_part(divided.model_copy(update={"shard": "15/15"}))
    assert open_part(divided.model_copy(update={"shard": "14/14"}))[1].num_rows == 1, "nothing was decided before"


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


def draw_pictures(inputs: Path, stop: int = NUM_ROWS) -> None:
    for i in range(stop):
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
    target = output.parent / "exported"
    exported = export_run(ExportOptions(output=str(output), target=str(target), format="jsonl", min_confidence={}))
    assert (exported.rows, exported.written, exported.error) == (NUM_ROWS, NUM_ROWS, 0)
    lines = [json.loads(line) for line in (target / "rows.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert len([*(target / "images").rglob("*.png")]) == NUM_ROWS
    listed = json.loads((output / "list" / "list.json").read_text())
    assert listed["ends"] == [NUM_ROWS]


def test_two_drivers_at_once_write_one_result(inputs: Path, tmp_path: Path, ray_cluster: None) -> None:
    draw_pictures(inputs)
    configs = [make_config(inputs, tmp_path, shard) for shard in ("1/2", "2/2")]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(run_pipeline, make_engine=FakeEngineFactory()), configs))
    assert sum(summary.rows for summary in found) == NUM_ROWS
    check_result(tmp_path / "out", 2)
    assert run_pipeline(configs[1], make_engine=FakeEngineFactory()).skipped_done == NUM_ROWS // 2


def test_each_driver_does_its_share_of_new_rows(
    inputs: Path, tmp_path: Path, ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    draw_pictures(inputs, NUM_ROWS + 4)
    configs = [make_config(inputs, tmp_path, shard) for shard in ("1/2", "2/2")]
    run_pipeline(configs[0], make_engine=FakeEngineFactory())
    append_lines(inputs, NUM_ROWS + 4)
    list_beforehand(make_config(inputs, tmp_path, extend=True))
    extended = [config.model_copy(update={"extend": True}) for config in configs]
    found = [run_pipeline(config, make_engine=FakeEngineFactory()) for config in extended]
    assert [(summary.rows, summary.skipped_done) for summary in found] == [(9, 7), (9, 0)]
    assert read_results(str(tmp_path / "out"))["id"].to_pylist() == [f"row {i}" for i in range(NUM_ROWS + 4)]
    record = read_whole_record(str(tmp_path / "out"))
    assert record is not None and (record["num_rows"], record["status"]) == (NUM_ROWS + 4, "finished")
    assert run_pipeline(extended[0], make_engine=FakeEngineFactory()).skipped_done == 9
    assert "the list has no further rows for this part" in caplog.text


def test_the_first_driver_cuts_the_videos_of_all(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        write_video(tmp_path / "in" / f"{number}.mp4", draw_shots(*[25] * (1 + number)))
    options = {"window_s": 1.0, "num_frames": 1, "keep_columns": (), "id_column": None}
    configs = [make_config(tmp_path / "in", tmp_path, shard, **options) for shard in ("1/3", "2/3", "3/3")]
    found = [run_pipeline(config, make_engine=FakeEngineFactory()) for config in configs]
    assert [summary.ok for summary in found] == [1, 1, 1]
    ids = [Path(id_).name for id_ in read_results(str(tmp_path / "out"))["id"].to_pylist()]
    assert ids == ["0.mp4", "1.mp4#t=0,1", "1.mp4#t=1"]
    write_video(tmp_path / "in" / "2.mp4", draw_shots(25, 25, 25))
    assert list_beforehand(make_config(tmp_path / "in", tmp_path, extend=True, **options)).num_rows == 6


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
