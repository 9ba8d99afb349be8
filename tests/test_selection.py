"""Directories and globs leave out hidden files, private files and the files of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

from pipelines.errors import SourceError
from pipelines.output.run_record import open_run
from pipelines.sources.directories import list_directory
from pipelines.storage import store
from tests.support.jsonl_files import write_lines
from tests.support.rows import list_input, make_config

MODEL = {"id": "demo", "revision": None}


def write_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1")
    return root


def list_names(root: Path, uri: object) -> list[str]:
    return [str(Path(row["uri"]).relative_to(root)) for row in list_input(uri)]


def write_shard(path: Path) -> None:
    write_lines(path, {"image": "a.png"})


@pytest.mark.parametrize(
    "hidden",
    [".a.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "b/.Trash-1000/files/a.png", "@eaDir/a.png"],
)
def test_hidden_images_are_left_out_and_counted(hidden: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_files(tmp_path / ".cache" / "pictures", "a.png", "_b.png", "_c/d.png", hidden)
    for uri in (root, root / "**"):
        caplog.clear()
        assert list_names(root, uri) == ["_b.png", "_c/d.png", "a.png"]
        assert "left out 1 file" in caplog.text and hidden in caplog.text


@pytest.mark.parametrize("glob", [".h/*.png", ".h/.b.png", "*/.b.png", ".*/*.png", "**/.h/*.png"])
def test_a_glob_that_names_a_hidden_name_keeps_it(glob: str, tmp_path: Path) -> None:
    write_files(tmp_path, ".h/a.png", ".h/.b.png", "v/.b.png")
    expected = {
        ".h/*.png": [".h/a.png"],
        ".h/.b.png": [".h/.b.png"],
        "*/.b.png": ["v/.b.png"],
        ".*/*.png": [".h/a.png"],
        "**/.h/*.png": [".h/a.png"],
    }
    assert list_names(tmp_path, tmp_path / glob) == expected[glob]


def test_a_glob_of_hidden_files_only_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, ".a.png")
    with pytest.raises(SourceError, match=r"1 file matches .* is hidden"):
        list_input(tmp_path / "*.png")


@pytest.mark.parametrize(
    "private", ["_temporary/0/a.jsonl", "_delta_log/a.jsonl", "_b.jsonl", "_SUCCESS", "_committed_1"]
)
def test_private_shards_are_left_out(private: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.jsonl")
    (tmp_path / "_day=1").mkdir()
    write_shard(tmp_path / "_day=1" / "a.jsonl")
    (tmp_path / private).parent.mkdir(parents=True, exist_ok=True)
    write_shard(tmp_path / private)
    for uri in (tmp_path, tmp_path / "**"):
        assert len(list_input(uri)) == 2


def write_run(root: str, name: str) -> None:
    """Write what an older run leaves in a directory below `root`."""
    record = {"fingerprint": "x", "model": MODEL, "num_rows": 1, "status": "done"}
    for file in ("data/rows-000000000000-000000000001.parquet", "manifest/rows-000000000000.parquet", "report.html"):
        store.write_bytes(f"{root}/{name}/{file}", b"1")
    store.write_bytes(f"{root}/{name}/run.json", json.dumps(record).encode())


def check_runs_are_left_out(root: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b/a.jsonl"):
        store.write_bytes(f"{root}/in/{name}", b'{"image": "a.png"}')
    write_run(root, "in/old")
    write_run(root, "in/b/older")
    for uri in (root, f"{root}/in", f"{root}/**", f"{root}/in/**"):
        caplog.clear()
        assert len(list_input(uri)) == 2
        assert "left out 8 files (8 of runs" in caplog.text
    assert len(list_input(f"{root}/in/b")) == 1
    assert len(list_directory(f"{root}/in/old")) == 2  # type: ignore[arg-type]  # named: its tables are input


def test_older_runs_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_runs_are_left_out(str(tmp_path), caplog)


def test_older_runs_are_left_out_in_a_store(bucket: object, caplog: pytest.LogCaptureFixture) -> None:
    check_runs_are_left_out("s3://bucket/x", caplog)


@pytest.mark.parametrize("output", ["out", "b/out", "../link/out", "."])
def test_extending_from_an_input_that_holds_output_adds_nothing(output: str, tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    write_shard(root / "a.jsonl")
    (tmp_path / "link").symlink_to(root)
    for uri in (root, root / "**"):
        values = {"output": str(root / output)}
        open_run(make_config(uri, **values, overwrite=True), MODEL)
        for _ in range(2):
            assert open_run(make_config(uri, **values, extend=True), MODEL).num_rows == 1


def test_an_interrupted_first_run_is_not_its_own_input(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.jsonl")
    config = make_config(tmp_path, output=str(tmp_path / "out"))
    open_run(config, MODEL)
    (tmp_path / "out" / "run.json").unlink()  # the run ended after it wrote the manifest
    assert open_run(config, MODEL).num_rows == 1


NAMES = st.sampled_from(["a.png", "b.jpg", ".c.png", "_d.png", "n.txt", "Thumbs.db"])
FOLDERS = st.sampled_from(["", "x/", ".y/", "_z/", "x/x/", "__MACOSX/", "x/.y/"])
TREES = st.sets(st.tuples(FOLDERS, NAMES).map("".join), min_size=1, max_size=8)


def check_directory_equals_glob(root: str, names: Iterable[str]) -> None:
    """Check that a directory lists what `**` lists, without hidden files, runs and other kinds."""
    for name in names:
        store.write_bytes(f"{root}/{name}", b"1")
    write_run(root, "old")
    images = {name for name in names if name.endswith(("png", "jpg"))}
    visible = {name for name in images if not any(p.startswith((".", "__")) for p in name.split("/"))}
    listed = [info.uri for info in list_directory(root)]
    assert {uri[len(root) + 1 :] for uri in listed} == visible
    if visible:
        in_glob = [row["uri"] for row in list_input(f"{root}/**")]
        assert [uri for uri in in_glob if uri.endswith(("png", "jpg"))] == listed
        assert not any("/old/" in uri for uri in in_glob)


@given(names=TREES)
@with_settings(max_examples=40)
def test_a_directory_equals_its_glob(names: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    check_directory_equals_glob(str(tmp_path_factory.mktemp("tree")), names)


@given(names=TREES)
@with_settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_directory_of_a_store_equals_its_glob(names: set[str], bucket: object) -> None:
    check_directory_equals_glob(f"s3://bucket/{uuid4().hex}", names)
