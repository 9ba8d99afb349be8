"""This version resumes OUTPUT of the first version: the same rows, the same texts, the same refusals."""

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
        write_record(place / job, relocate(read_record(place / job), place))
        manifest = place / job / "manifest" / "rows-000000000000.parquet"
        table = pq.read_table(manifest)
        pq.write_table(pa.Table.from_pylist(relocate(table.to_pylist(), place), table.schema), manifest)
    return place


def relocate(value: Any, place: Path) -> Any:
    """Replace PLACE at the start of every string inside `value`."""
    match value:
        case str() if value.startswith(PLACE):
            return str(place) + value.removeprefix(PLACE)
        case list():
            return [relocate(item, place) for item in value]
        case dict():
            return {name: relocate(item, place) for name, item in value.items()}
    return value


def read_record(output: Path) -> Json:
    record: Json = json.loads((output / "run.json").read_text())
    return record


def write_record(output: Path, record: Json) -> None:
    (output / "run.json").write_text(json.dumps(record, indent=2))


def compute_fingerprint(record: Json) -> str:
    """Compute the fingerprint as the first version does."""
    settings = {name: record[name] for name in ("config", "model")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def interrupt(output: Path) -> Path:
    """Change OUTPUT to that of a run killed before it wrote the second of its three files."""
    (output / "data" / "rows-000000000004-000000000008.parquet").unlink()
    record = read_record(output)
    del record["counts"]
    write_record(output, {**record, "status": "running"})
    return output


def drop_option(output: Path, name: str) -> None:
    """Change run.json to that of a version without this option."""
    record = read_record(output)
    for options in (record["config"], record["options"]):
        del options[name]
    write_record(output, record)


def run_again(job: str, place: Path, *options: str) -> Finished:
    """Run the command that made `place / job` again, with more options appended."""
    if job == "caption":
        arguments = [place / "pictures", place / job, "--max-new-tokens", "24"]
    else:
        questions = ["--tasks", place / "tasks.yaml", "--keep-columns", "question,weight"]
        arguments = [place / "pictures.jsonl", place / job, *questions]
    return run_job(job, *arguments, "--model", "demo", "--rows-per-file", "4", "--max-error-rate", "0.5", *options)


def read_rows(output: Path) -> list[Json]:
    """Return all rows in order without probabilities, whose last bits may depend on the batch and the machine."""
    table = read_results(str(output))
    inexact = [name for name in table.column_names if name == "mean_logprob" or name.endswith("_confidence")]
    rows: list[Json] = relocate(table.drop_columns(inexact).to_pylist(), output.parent)
    return rows


def read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_an_interrupted_run_is_resumed_with_the_same_rows(place: Path, job: str) -> None:
    whole = read_rows(place / job)
    output = interrupt(place / job)
    written = read_files(output / "data")
    with OpenCounter(place / "pictures") as counter:
        finished = run_again(job, place)
    assert finished.exit_code == 0, finished.stderr
    assert [finished.summary[name] for name in ("rows", "ok", "error", "skipped_done")] == [12, 10, 2, 8]
    assert set(counter.opens) == {"04.png", "05.png", "06.png", "07.jpg"}
    assert read_files(output / "data").items() >= written.items()
    assert read_rows(output) == whole


@pytest.mark.parametrize("job", JOBS)
def test_a_finished_run_keeps_its_fingerprint_and_files(place: Path, job: str) -> None:
    as_made, moved = read_record(DATA / job), read_record(place / job)
    assert compute_fingerprint(as_made) == as_made["fingerprint"]
    written = read_files(place / job / "data")
    extended = run_again(job, place, "--extend")  # writes a fingerprint, and finds no new rows
    assert extended.exit_code == 0, extended.stderr
    assert extended.summary["skipped_done"] == extended.summary["rows"] == 12
    assert read_record(place / job)["fingerprint"] == compute_fingerprint(moved) != as_made["fingerprint"]
    assert read_files(place / job / "data") == written


@pytest.mark.parametrize(
    ("job", "options", "difference"),
    [
        ("caption", ["--max-new-tokens", "25"], ["max-new-tokens", "24", "25"]),
        ("caption", ["--prompt", "Why?"], ["prompt", "'Describe the image.'", "'Why?'"]),
        ("annotate", ["--keep-columns", "weight"], ["keep-columns", "'question'", "'weight'"]),
    ],
)
def test_other_options_are_refused(place: Path, job: str, options: list[str], difference: list[str]) -> None:
    assert_refused(run_again(job, place, *options), difference)


def test_other_tasks_are_refused(place: Path) -> None:
    tasks = place / "tasks.yaml"
    tasks.write_text(tasks.read_text().replace("[white, grey, black]", "[white, black]"))
    assert_refused(run_again("annotate", place), ["background", "'grey'"])


def assert_refused(finished: Finished, difference: list[str]) -> None:
    assert finished.exit_code == 2
    last_line = finished.stderr.splitlines()[-1]
    assert [part for part in difference if part not in last_line] == [], last_line


@pytest.mark.parametrize("option", ["fps", "top_k"])
def test_an_option_that_run_json_lacks_counts_as_its_default(place: Path, option: str) -> None:
    drop_option(place / "caption", option)
    finished = run_again("caption", place)
    assert finished.exit_code == 0, finished.stderr
    assert finished.summary["skipped_done"] == 12
    assert_refused(run_again("caption", place, f"--{option.replace('_', '-')}", "5"), [option.replace("_", "-"), "5"])


@pytest.mark.parametrize("job", JOBS)
def test_a_run_can_be_compacted_and_reported(place: Path, job: str) -> None:
    rows = read_rows(place / job)
    compacted = run_job("compact", place / job)
    assert compacted.exit_code == 0, compacted.stderr
    assert len(read_files(place / job / "data")) == 1
    assert read_rows(place / job) == rows
    reported = run_job("report", place / job)
    assert reported.exit_code == 0, reported.stderr
    assert [reported.summary[name] for name in ("rows", "ok", "error", "without_media")] == [12, 10, 2, 2]
