"""A run that is refused, fails or dies before it starts leaves OUTPUT bit for bit as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from botocore.exceptions import ParamValidationError

from jobs.cli import run_job
from pipelines.checks import describe_models
from pipelines.config import CaptionConfig
from pipelines.errors import ResourceError, RunError, SourceError, StoreFault
from pipelines.output import run_record
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger
from pipelines.output.manifest import read_columns
from pipelines.output.run_record import note_unchanged, open_run, prepare_run, read_record
from pipelines.output.sink import write_file
from pipelines.pipeline import run_pipeline
from pipelines.sources import Listing
from pipelines.storage import store
from tests.support.golden_data import checkpoint_dir
from tests.support.outputs import make_results
from tests.support.pictures import encode_picture

MODEL = {"id": "demo", "revision": None, "weights": "none"}
NOT_OUTPUT = "driver.json"  # the lease, which a killed driver leaves


class Killed(BaseException):
    """The process dies: nothing that runs afterwards has an effect."""


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield a directory or a URI for OUTPUT."""
    if request.param == "disk":
        yield str(tmp_path / "out")
        return
    yield "memory://out"
    fs = fsspec.filesystem("memory")
    if fs.exists("/out"):
        fs.rm("/out", recursive=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("old", "new"):
        for i in range(4 if name == "old" else 7):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(encode_picture(i))
    return tmp_path


def make_config(pictures: Path, place: str, name: str, **options: object) -> CaptionConfig:
    return CaptionConfig(input=(str(pictures / name),), output=place, model="demo", **options)  # type: ignore[arg-type]


def finish_old_run(pictures: Path, place: str) -> dict[str, bytes]:
    """Write a finished run of four rows; return its files."""
    run = open_run(make_config(pictures, place, "old"), MODEL)
    write_file(run.data_uri, make_results(range(4)))
    run.update(status="finished")
    return read_output(place)


def read_output(place: str) -> dict[str, bytes]:
    files = {info.uri: store.read_bytes(info.uri) for info in store.list_files(place)}
    return {uri: data for uri, data in files.items() if not uri.endswith(NOT_OUTPUT)}


def list_directories(place: str) -> set[str]:
    return {str(path) for path in Path(place).rglob("*") if path.is_dir()} if "://" not in place else set()


def read_ids(place: str) -> list[str]:
    record = read_record(place)
    assert record is not None
    return [id_ for table in read_columns(place, record["num_rows"], ["id"]) for id_ in table["id"].to_pylist()]


def release_lease_of_dead_driver(place: str) -> None:
    store.remove(store.join(place, "driver.json"))


def count_calls(patch: pytest.MonkeyPatch, fail_at: int, error: Callable[[str], BaseException], *, dies: bool) -> None:
    """Let the call number `fail_at` that changes the store fail, and all later ones if the process dies."""
    left = fail_at

    def patch_call(name: str) -> None:
        real = getattr(store, name)

        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left == -1 or (dies and left < 0):
                raise error(name)
            return real(*arguments)

        patch.setattr(store, name, call)

    for name in ("write_bytes", "move", "remove"):
        patch_call(name)


def begin(config: CaptionConfig) -> None:
    """Prepare and start a run with a lease that no thread renews, so that every step is counted."""
    lease = Lease(config.output)
    lease._write()
    with prepare_run(config, MODEL) as prepared:
        prepared.start(lease)


@pytest.mark.parametrize("option", ["overwrite", "extend"])
@pytest.mark.parametrize("fault", ["kill", "store", "disk", "interrupt"])
def test_a_fault_at_any_step_leaves_the_old_run_or_the_new_one(
    pictures: Path, place: str, monkeypatch: pytest.MonkeyPatch, option: str, fault: str
) -> None:
    error = {"kill": Killed, "store": StoreFault, "disk": OSError, "interrupt": KeyboardInterrupt}[fault]
    states = set()
    for step in range(100):
        before = finish_old_run(pictures, place)
        config = make_config(pictures, place, "new", **{option: True})
        with monkeypatch.context() as patch:
            count_calls(patch, step + 1, error, dies=fault == "kill")  # after the lease
            try:
                begin(config)
                is_whole = True
            except (Killed, StoreFault, OSError, KeyboardInterrupt, RunError):
                is_whole = False
        release_lease_of_dead_driver(place)
        has_begun = read_record(place) != json.loads(before[find(before, "run.json")])
        states.add(has_begun)
        if fault != "kill" and not has_begun:
            assert read_output(place) == before
        # Whoever opens OUTPUT next finishes or undoes the exchange.
        if has_begun:
            open_run(make_config(pictures, place, "new"), MODEL)
            assert_new_run(pictures, place, option)
        else:
            open_run(make_config(pictures, place, "old"), MODEL)
            assert read_output(place) == before
        fsspec.filesystem("memory" if "://" in place else "file").rm(place.replace("memory:/", ""), recursive=True)
        if is_whole:
            break
    assert step >= 6
    assert states == {False, True}


def find(files: dict[str, bytes], name: str) -> str:
    return next(uri for uri in files if uri.endswith(name))


def assert_new_run(pictures: Path, place: str, option: str) -> None:
    done = Ledger.read(store.join(place, "data")).done
    old = [str(pictures / "old" / f"{i}.png") for i in range(4)] if option == "extend" else []
    assert [tuple(r) for r in done] == ([(0, 4)] if option == "extend" else [])
    assert read_ids(place) == old + [str(pictures / "new" / f"{i}.png") for i in range(7)]
    assert not store.list_files(store.join(place, "exchange"))


@pytest.mark.parametrize("option", ["overwrite", "extend", ""])
@pytest.mark.parametrize("error", [pa.ArrowNotImplementedError, SourceError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("step", ["list_rows", "read_tables"])
def test_an_exception_while_listing_changes_nothing(
    pictures: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    error: type[BaseException],
    step: str,
) -> None:
    if option:
        finish_old_run(pictures, place)
    before, directories = read_output(place), list_directories(place)

    def fail(*arguments: object, **options: object) -> None:
        raise error("planted")

    def fail_midway(listing: Listing) -> Iterator[pa.Table]:
        yield next(real(listing))
        raise error("planted")

    real = Listing.read_tables
    if step == "list_rows":
        monkeypatch.setattr(run_record, "list_rows", fail)
    else:
        monkeypatch.setattr(Listing, "read_tables", fail_midway)
    with pytest.raises(error, match="planted"):
        open_run(make_config(pictures, place, "new", **({option: True} if option else {})), MODEL)
    assert read_output(place) == before
    assert list_directories(place) == directories
    assert option or "://" in place or not Path(place).exists()


def test_an_overwrite_that_an_older_version_did_not_finish_is_repeated(pictures: Path, place: str) -> None:
    finish_old_run(pictures, place)
    store.write_bytes(store.join(place, "run.json"), b'{"status": "replaced"}')
    with pytest.raises(RunError, match="run it again with --overwrite"):
        open_run(make_config(pictures, place, "new"), MODEL)
    assert open_run(make_config(pictures, place, "new", overwrite=True), MODEL).num_rows == 7
    assert_new_run(pictures, place, "overwrite")


def test_an_exchange_that_an_older_version_committed_is_finished(pictures: Path, place: str) -> None:
    before = finish_old_run(pictures, place)
    data = find(before, "rows-000000000000-000000000004.parquet")
    store.write_bytes(store.join(place, "exchange", "rows-000000000000-000000000009.parquet"), before[data])
    note = {"new": ["rows-000000000000-000000000009.parquet"], "old": [data.rsplit("/", 1)[-1], "../../x", "run.json"]}
    store.write_bytes(store.join(place, "exchange", "exchange.json"), json.dumps(note).encode())
    open_run(make_config(pictures, place, "old"), MODEL)
    after = read_output(place)
    assert after.pop(find(after, "rows-000000000000-000000000009.parquet")) == before.pop(data)
    assert after == before


def test_files_of_others_are_never_removed(pictures: Path, place: str) -> None:
    finish_old_run(pictures, place)
    for name in ("notes.txt", "exchange/notes.txt", "more/rows-000000000000.parquet"):
        store.write_bytes(store.join(place, name), b"not of a run")
    with pytest.raises(RunError, match=r"notes\.txt"):
        open_run(make_config(pictures, place, "new", overwrite=True), MODEL)
    store.remove(store.join(place, "exchange/notes.txt"))
    open_run(make_config(pictures, place, "new", overwrite=True), MODEL)
    assert store.read_bytes(store.join(place, "more/rows-000000000000.parquet")) == b"not of a run"


def test_an_overwrite_in_an_object_store_is_all_or_nothing(
    pictures: Path, bucket: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 3, 4, 6):
        place = f"s3://bucket/{step}"
        before = finish_old_run(pictures, place)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_calls(patch, step, Killed, dies=True)
            begin(make_config(pictures, place, "new", overwrite=True))
        release_lease_of_dead_driver(place)
        if step > 3:  # manifest, run.json and the note are written
            open_run(make_config(pictures, place, "new"), MODEL)
            assert_new_run(pictures, place, "overwrite")
        else:
            open_run(make_config(pictures, place, "old"), MODEL)
            assert read_output(place) == before


REFUSED: dict[str, dict[str, object]] = {
    "a device that does not exist": {"device": "cuda"},
    "GPUs that do not exist": {"device": "cuda", "num_replicas": 9},
    "ranks that do not divide the heads": {"tensor_parallel": 3},
    "an unknown column": {"id_column": "nowhere"},
    "a kept column that does not exist": {"keep_columns": ("nowhere",)},
    "an input that does not exist": {"input": ("nowhere/at/all",)},
    "a model that does not exist": {"model": "nowhere/at/all"},
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_refused_leaves_no_trace(ray_cluster: None, pictures: Path, refused: str) -> None:
    output = pictures / "a" / "b"
    options = {"input": (str(pictures / "old"),), "model": str(checkpoint_dir("tiny56-tied")), **REFUSED[refused]}
    config = CaptionConfig(output=str(output), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\w") as caught:
        run_pipeline(config)
    assert not (pictures / "a").exists()
    assert "cuda" not in str(options.get("device")) or isinstance(caught.value, ResourceError)
    (pictures / "empty").mkdir()
    with pytest.raises(ValueError, match=r"\w"):
        run_pipeline(config.model_copy(update={"output": str(pictures / "empty")}))
    assert list((pictures / "empty").iterdir()) == []


def test_a_resume_on_another_device_changes_nothing(ray_cluster: None, pictures: Path) -> None:
    place = str(pictures / "out")
    config = CaptionConfig(input=(str(pictures / "old"),), output=place, model=str(checkpoint_dir("tiny56-tied")))
    open_run(config, describe_models(config)).update(settled_dtype="bfloat16")
    before = read_output(place)
    with pytest.raises(RunError, match="generated in bfloat16"):
        run_pipeline(config)
    assert read_output(place) == before
    assert not (pictures / "out" / "driver.json").exists()


@pytest.mark.parametrize(
    ("make_error", "exit_code", "message"),
    [
        (
            lambda: pa.ArrowNotImplementedError("no struct\nmore"),
            1,
            "error: pyarrow: ArrowNotImplementedError: no struct. ",
        ),
        (lambda: pa.ArrowInvalid("no"), 1, "error: pyarrow: ArrowInvalid: no. "),  # also a ValueError
        (
            lambda: ParamValidationError(report="no bucket"),
            1,
            "error: botocore: ParamValidationError: Parameter validation",
        ),
        (lambda: StoreFault("the store fails"), 1, "error: the store fails. "),
        (KeyboardInterrupt, 1, "stopped. "),
        (lambda: RunError("another run"), 2, "error: another run\n"),
    ],
)
@pytest.mark.parametrize("has_begun", [False, True])
def test_exceptions_of_libraries_are_one_sentence(
    capsys: pytest.CaptureFixture[str],
    make_error: Callable[[], BaseException],
    exit_code: int,
    message: str,
    has_begun: bool,
) -> None:
    def fail() -> None:
        with nullcontext() if has_begun else note_unchanged():
            raise make_error()

    assert run_job(fail) == exit_code
    stderr = capsys.readouterr().err
    assert stderr.startswith(message) and stderr.count("\n") == 1
    if exit_code == 1:
        assert ("Finished rows are saved" if has_begun else "OUTPUT is unchanged") in stderr


@pytest.mark.parametrize("error", [AssertionError, AttributeError, KeyError, TypeError])
def test_our_bugs_show_a_trace(error: type[Exception]) -> None:
    def fail() -> None:
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        run_job(fail)
