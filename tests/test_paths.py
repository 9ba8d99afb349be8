"""Paths in manifests and URIs name the same file in every store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import StoreError
from pipelines.media.reference import resolve_path
from pipelines.storage import store
from tests.support.fetched import fetch_images
from tests.support.jsonl_files import write_lines
from tests.support.rows import Row, list_input

PATHS = ("1.png", "./1.png", "../other/2.png", "sub/../1.png", "../in/./1.png")
CONTENT = [b"one", b"one", b"two", b"one", b"one"]


def read_images(rows: list[Row]) -> list[bytes]:
    return [data for images in fetch_images(rows) for data in images]


def write_manifests(root: str, tmp_path: Path) -> list[str]:
    """Write a manifest of PATHS as JSON lines and as Parquet, with the images."""
    lines = write_lines(tmp_path / "m.jsonl", *({"image": path} for path in PATHS))
    pq.write_table(pa.table({"image": PATHS}), tmp_path / "m.parquet")
    store.write_bytes(f"{root}/in/1.png", b"one")
    store.write_bytes(f"{root}/other/2.png", b"two")
    store.write_bytes(f"{root}/in/sub/3.png", b"three")
    for file in (lines, tmp_path / "m.parquet"):
        store.write_bytes(f"{root}/in/{file.name}", file.read_bytes())
    return [f"{root}/in/{name}" for name in ("m.jsonl", "m.parquet")]


def test_dots_in_paths_are_resolved(tmp_path: Path) -> None:
    for manifest in write_manifests(str(tmp_path / "root"), tmp_path):
        assert read_images(list_input(manifest)) == CONTENT


def test_dots_in_paths_are_resolved_in_a_store(bucket: object, tmp_path: Path) -> None:
    for manifest in write_manifests("s3://bucket/x", tmp_path):
        assert read_images(list_input(manifest)) == CONTENT
    [row] = list_input("s3://bucket/x/in/../other/./2.png")
    assert row["uri"] == "s3://bucket/x/other/2.png"


def test_a_path_above_the_bucket_fails_only_its_row(bucket: object, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "m.jsonl", {"image": "../../secret/1.png"}, {"image": "1.png"})
    store.write_bytes("s3://bucket/m.jsonl", lines.read_bytes())
    store.write_bytes("s3://bucket/1.png", b"one")
    above, below = list_input("s3://bucket/m.jsonl")
    assert read_images([below]) == [b"one"]
    with pytest.raises(OSError, match="leads above its bucket"):
        fetch_images([above])
    with pytest.raises(StoreError, match="leads above its bucket"):
        list_input("s3://bucket/../secret/1.png")


@pytest.mark.parametrize(
    ("path", "base", "resolved"),
    [
        ("../a.png", "https://host/x/y/m.jsonl?signature=a/b", "https://host/x/y/../a.png"),
        ("https://host/a?next=/../b", "s3://b/m", "https://host/a?next=/../b"),
        ("s3://b/x//./y/../a.png", "m", "s3://b/x//a.png"),
        ("../.hidden/..a.png", "gs://b/x/m", "gs://b/.hidden/..a.png"),
        ("../a.png", "/x/y/m", "/x/y/../a.png"),
    ],
)
def test_paths_are_resolved(path: str, base: str, resolved: str) -> None:
    assert resolve_path(path, base) == resolved


@pytest.mark.parametrize("uri", ["file://{}/a%20b.png", "file://localhost{}/a%20b.png", "file://{}/a b.png"])
def test_file_uris_are_decoded(uri: str, tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"one")
    uri = uri.format(tmp_path)
    [row] = list_input(write_lines(tmp_path / "m.jsonl", {"image": uri}))
    assert read_images([row]) == [b"one"]
    assert [row["uri"] for row in list_input(uri)] == [str(tmp_path / "a b.png")]


def test_a_name_that_really_has_escapes_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"one")
    (tmp_path / "a%20b.png").write_bytes(b"two")
    assert store.read_bytes(f"file://{tmp_path}/a%20b.png") == b"two"


def test_empty_objects_that_stand_for_folders_are_no_files(bucket: Any) -> None:
    objects = {"in/": b"", "in/a.png": b"1", "in/sub.png": b"", "in/sub.png/b.png": b"2", "in/empty/": b""}
    objects |= {"in/x_$folder$": b"", "in/zero.png": b"", "in/sub.png-3": b"3"}
    for name, data in objects.items():
        bucket.pipe_file(f"bucket/{name}", data)
    expected = ["in/a.png", "in/sub.png/b.png", "in/zero.png"]
    assert [row["uri"] for row in list_input("s3://bucket/in")] == [f"s3://bucket/{name}" for name in expected]
    for uri in ("s3://bucket/in/**", "s3://bucket/**"):
        names = [row["uri"] for row in list_input(uri) if not row["uri"].endswith("-3")]
        assert names == [f"s3://bucket/{name}" for name in expected]
    assert [row["uri"] for row in list_input("s3://bucket/in/sub.png")] == ["s3://bucket/in/sub.png/b.png"]
