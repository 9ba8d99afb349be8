"""A run is continued: error rows are retried, rows are added, files are compacted. A broken run stops early."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.config import CaptionConfig
from pipelines.errors import EverythingFails
from pipelines.monitoring.error_reasons import ErrorMonitor
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.fake_engine import FakeEngineFactory
from tests.support.golden_data import checkpoint_dir
from tests.support.outputs import make_results
from tests.support.processes import Job, OpenCounter

MODEL = str(checkpoint_dir("tiny56-tied"))


def make_config(pictures: Path, output: Path, **options: object) -> CaptionConfig:
    values = {"model": MODEL, "max_new_tokens": 4, **options}
    return CaptionConfig(input=(str(pictures),), output=str(output), **values)  # type: ignore[arg-type]


def write_pictures(directory: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    directory.mkdir(exist_ok=True)
    for i in range(count):
        path = directory / f"{i:05}.png"
        if i in broken:
            path.write_bytes(b"no picture")
        else:
            Image.new("RGB", (20 + i % 9, 20), (i % 256, 0, 90)).save(path)
    return directory


def read_statuses(output: Path) -> list[str]:
    return list(read_results(str(output)).column("status").to_pylist())


def test_only_error_rows_are_retried(ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures, output = write_pictures(tmp_path / "pictures", 20, broken=(3, 4, 11)), tmp_path / "out"
    engine = FakeEngineFactory()
    assert run_pipeline(make_config(pictures, output, rows_per_file=7), make_engine=engine).error == 3
    write_pictures(pictures, 12, broken=(4,))
    assert run_pipeline(make_config(pictures, output), make_engine=engine).error == 3  # not without --retry-errors
    assert "20 rows are in OUTPUT already, 3 error rows among them; --retry-errors runs" in caplog.text
    with OpenCounter(pictures) as counter:
        summary = run_pipeline(make_config(pictures, output, retry_errors=True), make_engine=engine)
    assert set(counter.opens) == {f"{i:05}.png" for i in (3, 4, 11)}
    assert (summary.rows, summary.ok, summary.error, summary.skipped_done) == (20, 19, 1, 17)
    assert [i for i, status in enumerate(read_statuses(output)) if status == "error"] == [4]
    record = json.loads((output / "run.json").read_text())
    assert record["counts"] == {"ok": 19, "error": 1}


def test_a_run_is_extended_and_compacted(ray_cluster: None, tmp_path: Path) -> None:
    pictures, output = write_pictures(tmp_path / "pictures", 9), tmp_path / "out"
    engine = FakeEngineFactory()
    run_pipeline(make_config(pictures, output, rows_per_file=4), make_engine=engine)
    write_pictures(pictures, 14)
    with OpenCounter(pictures) as counter:
        summary = run_pipeline(make_config(pictures, output, rows_per_file=4, extend=True), make_engine=engine)
    assert set(counter.opens) == {f"{i:05}.png" for i in range(9, 14)}
    assert (summary.rows, summary.skipped_done) == (14, 9)
    before = read_results(str(output))
    done = Job(["jobs.compact", str(output)]).start().finish()
    assert done.exit_code == 0, done.stderr
    assert done.summary["files_after"] == len(list((output / "data").iterdir())) == 1
    assert read_results(str(output)).equals(before)
    assert run_pipeline(make_config(pictures, output, extend=True), make_engine=engine).skipped_done == 14


def test_compacting_while_a_run_writes_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "run.json").write_text("{}")
    from pipelines.output.lease import Lease

    with Lease(str(output)):
        refused = Job(["jobs.compact", str(output)]).start().finish()
    assert refused.exit_code == 2
    assert "another run writes here" in refused.stderr


def test_a_run_in_which_everything_fails_stops_early(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures, output = write_pictures(tmp_path / "pictures", 6000, broken=tuple(range(6000))), tmp_path / "out"
    with pytest.raises(EverythingFails, match="--retry-errors"):
        run_pipeline(make_config(pictures, output), make_engine=FakeEngineFactory())
    assert "x decode: not an image" in caplog.text
    written = read_statuses(output)
    assert set(written) == {"error"}
    assert 500 <= len(written) < 6000  # finished rows are kept
    assert json.loads((output / "run.json").read_text())["status"] == "stopped"


def test_reasons_that_differ_only_in_numbers_are_counted_together(caplog: pytest.LogCaptureFixture) -> None:
    reasons = ErrorMonitor(stop_error_rate=1)
    rows = make_results(range(30), errors=range(25)).to_pylist()
    for i, row in enumerate(rows[:20]):
        row["error"] = f"{i * 1000:,} bytes are too many"
    reasons.add(pa.Table.from_pylist(rows, make_results([0]).schema))
    reasons.log()
    assert "25 error rows" in caplog.text
    assert "20 x decode: 0 bytes are too many" in caplog.text
    assert "5 x decode: why" in caplog.text


def test_a_run_under_500_rows_is_never_stopped() -> None:
    reasons = ErrorMonitor(stop_error_rate=0.9)
    reasons.add(make_results(range(499), errors=range(499)))
    with pytest.raises(EverythingFails, match="500 of the first 500 rows"):
        reasons.add(make_results([499], errors=[499]))
    half = ErrorMonitor(stop_error_rate=0.9)
    half.add(make_results(range(1000), errors=range(900)))
