"""Directories, globs and files become rows."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from pipelines.errors import SourceError
from pipelines.storage.store import read_bytes
from tests.support.rows import Row, list_input


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/2.PNG", "a/1.jpg", "a/_3.webp", "a/notes.txt", "img[1].jpg", ".hidden.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12345")
    return tmp_path


def list_names(rows: list[Row]) -> list[str]:
    return [Path(row["uri"]).name for row in rows]


def test_a_directory_gives_its_images_in_order(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = list_input(tree)
    assert list_names(rows) == ["1.jpg", "_3.webp", "2.PNG", "img[1].jpg"]
    assert all(row["id"] == row["uri"] and row["images"][0]["num_bytes"] == 5 and not row["error"] for row in rows)
    assert "skipped 1 file" in caplog.text and "1 .txt" in caplog.text


def test_a_named_file_is_read_whatever_its_suffix(tree: Path) -> None:
    assert list_names(list_input(tree / "a" / "notes.txt", tree / "img[1].jpg")) == ["notes.txt", "img[1].jpg"]


def test_globs_match_files_in_order(tree: Path) -> None:
    assert list_names(list_input(tree / "**" / "*.jpg")) == ["1.jpg", "img[1].jpg"]
    with pytest.raises(SourceError, match="no files match"):
        list_input(tree / "*.bmp")


def test_a_file_name_is_never_parsed_as_a_uri(tree: Path) -> None:
    for name in ("1.jpg::x.jpg", "a#b?.jpg", "memory:c.jpg", "~d.jpg"):
        (tree / name).write_bytes(b"123456789")
    rows = {Path(row["uri"]).name: row for row in list_input(tree)}
    strange = ("1.jpg::x.jpg", "a#b?.jpg", "memory:c.jpg", "~d.jpg")
    assert all(rows[name]["images"][0]["num_bytes"] == 9 for name in strange)
    assert read_bytes(rows["1.jpg::x.jpg"]["uri"]) == b"123456789"


def test_links_are_followed_once(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "b" / "up").symlink_to(tree)
    outside = tree.parent / f"{tree.name}-outside"
    outside.mkdir()
    (outside / "4.jpg").touch()
    (tree / "link").symlink_to(outside)
    assert list_names(list_input(tree)).count("1.jpg") == 1
    assert "skipped 1 link to directories listed already" in caplog.text
    assert "4.jpg" in list_names(list_input(tree))


def test_the_limit_counts_over_several_inputs(tree: Path) -> None:
    assert list_names(list_input(tree / "b", tree / "a", limit=2)) == ["2.PNG", "1.jpg"]


def test_a_repeated_id_is_refused_by_name(tree: Path) -> None:
    with pytest.raises(SourceError, match=r"2 rows repeat an id.*1\.jpg \(2 times\)"):
        list_input(tree / "a", tree / "a")


def test_missing_inputs_and_unknown_shards_are_refused(tree: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        list_input(tree / "nothing")
    (tree / "shard.zip").touch()
    with pytest.raises(SourceError, match=r"not supported; convert them to \.tar"):
        list_input(tree / "shard.zip")


def test_an_object_store_keeps_its_scheme() -> None:
    with fsspec.open("memory://bucket/pictures/a.png", "wb") as file:
        file.write(b"123")
    assert [row["uri"] for row in list_input("memory://bucket/pictures")] == ["memory:///bucket/pictures/a.png"]


def test_an_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        list_input("nosuch://bucket/x")
