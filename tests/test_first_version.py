"""OUTPUT of the first version goes on in this one: the same rows, the same texts, the same refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.output.sink import read_results
from tests.support.processes import Finished, OpenCounter, run_job

DATA = Path(__file__).parent / "first_version"
PLACE = "/tmp/first_version"  # where first_version/make.py made the runs
JOBS = ("caption", "annotate")
Json = dict[str, Any]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Copy the inputs and both finished runs, as if they had been made there."""
    place = tmp_path / "first_version"
    shutil.copytree(DATA, place)
    for job in JOBS:
        write_record(place / job, move(read_record(place / job), place))
        manifest = place / job / "manifest" / "rows-000000000000.parquet"
        table = pq.read_table(manifest)
        pq.write_table(pa.Table.from_pylist(move(table.to_pylist(), place), table.schema), manifest)
    return place


def move(value: Any, place: Path) -> Any:
    """Replace PLACE in every text inside `value` that begins with it."""
    match value:
        case str() if value.startswith(PLACE):
            return str(place) + value.removeprefix(PLACE)
        case list():
            return [move(item, place) for item in value]
        case dict():
            return {name: move(item, place) for name, item in value.items()}
    return value


def read_record(output: Path) -> Json:
    record: Json = json.loads((output / "run.json").read_text())
    return record


def write_record(output: Path, record: Json) -> None:
    (output / "run.json").write_text(json.dumps(record, indent=2))


def fingerprint_of(record: Json) -> str:
    """Compute the fingerprint as the first version does."""
    what = {name: record[name] for name in ("config", "model")}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def interrupt(output: Path) -> Path:
    """Leave what a run leaves that was killed when its second file of three was not written yet."""
    (output / "data" / "rows-000000000004-000000000008.parquet").unlink()
    record = read_record(output)
    del record["counts"]
    write_record(output, {**record, "status": "running"})
    return output


def drop_option(output: Path, name: str) -> None:
    """Make run.json that of a version that did not have the option."""
    record = read_record(output)
    for options in (record["config"], record["options"]):
        del options[name]
    write_record(output, record)


def start_again(job: str, place: Path, *options: str) -> Finished:
    """Run the command that made `place / job`, with more options behind it."""
    if job == "caption":
        arguments = [place / "pictures", place / job, "--max-new-tokens", "24"]
    else:
        asked = ["--tasks", place / "tasks.yaml", "--keep-columns", "question,weight"]
        arguments = [place / "pictures.jsonl", place / job, *asked]
    return run_job(job, *arguments, "--model", "demo", "--rows-per-file", "4", "--max-error-rate", "0.5", *options)


def rows_of(output: Path) -> list[Json]:
    """Return all rows in order, without probabilities, whose last bits may depend on the batch and on the machine."""
    table = read_results(str(output))
    inexact = [name for name in table.column_names if name == "mean_logprob" or name.endswith("_confidence")]
    rows: list[Json] = move(table.drop_columns(inexact).to_pylist(), output.parent)
    return rows


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("job", JOBS)
def test_an_interrupted_run_is_resumed(place: Path, job: str) -> None:
    whole = rows_of(place / job)
    output = interrupt(place / job)
    written = contents(output / "data")
    with OpenCounter(place / "pictures") as counter:
        finished = start_again(job, place)
    assert finished.exit_code == 0, finished.stderr
    assert [finished.summary[name] for name in ("rows", "ok", "error", "skipped_done")] == [12, 10, 2, 8]
    assert set(counter.opens) == {"04.png", "05.png", "06.png", "07.jpg"}
    assert contents(output / "data").items() >= written.items()
    assert rows_of(output) == whole


@pytest.mark.parametrize("job", JOBS)
def test_a_finished_run_is_recognised_by_an_equal_fingerprint(place: Path, job: str) -> None:
    as_made, moved = read_record(DATA / job), read_record(place / job)
    assert fingerprint_of(as_made) == as_made["fingerprint"]
    written = contents(place / job / "data")
    extended = start_again(job, place, "--extend")  # which writes a fingerprint, and finds no row that is new
    assert extended.exit_code == 0, extended.stderr
    assert extended.summary["skipped_done"] == extended.summary["rows"] == 12
    assert read_record(place / job)["fingerprint"] == fingerprint_of(moved) != as_made["fingerprint"]
    assert contents(place / job / "data") == written


@pytest.mark.parametrize(
    ("job", "options", "difference"),
    [
        ("caption", ["--max-new-tokens", "25"], ["max-new-tokens", "24", "25"]),
        ("caption", ["--prompt", "Why?"], ["prompt", "'Describe the image.'", "'Why?'"]),
        ("annotate", ["--keep-columns", "weight"], ["keep-columns", "'question'", "'weight'"]),
    ],
)
def test_other_options_are_refused(place: Path, job: str, options: list[str], difference: list[str]) -> None:
    assert_refused(start_again(job, place, *options), difference)


def test_other_tasks_are_refused(place: Path) -> None:
    tasks = place / "tasks.yaml"
    tasks.write_text(tasks.read_text().replace("[white, grey, black]", "[white, black]"))
    assert_refused(start_again("annotate", place), ["background", "'grey'"])


def assert_refused(finished: Finished, difference: list[str]) -> None:
    assert finished.exit_code == 2
    last_line = finished.stderr.splitlines()[-1]
    assert [part for part in difference if part not in last_line] == [], last_line


@pytest.mark.parametrize("option", ["fps", "top_k"])
def test_an_option_that_run_json_lacks_counts_as_its_default(place: Path, option: str) -> None:
    drop_option(place / "caption", option)
    finished = start_again("caption", place)
    assert finished.exit_code == 0, finished.stderr
    assert finished.summary["skipped_done"] == 12
    assert_refused(start_again("caption", place, f"--{option.replace('_', '-')}", "5"), [option.replace("_", "-"), "5"])


@pytest.mark.parametrize("job", JOBS)
def test_the_other_jobs_read_a_run(place: Path, job: str) -> None:
    rows = rows_of(place / job)
    compacted = run_job("compact", place / job)
    assert compacted.exit_code == 0, compacted.stderr
    assert len(contents(place / job / "data")) == 1
    assert rows_of(place / job) == rows
    reported = run_job("report", place / job)
    assert reported.exit_code == 0, reported.stderr
    assert [reported.summary[name] for name in ("rows", "ok", "error", "without_media")] == [12, 10, 2, 2]
