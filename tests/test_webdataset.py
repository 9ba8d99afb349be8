"""WebDataset's habits: braces, joined URLs, dots in names, wrong suffixes, tables next to tars."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import SourceError, StoreError
from pipelines.output.run_record import open_run
from pipelines.sources.braces import expand_names
from pipelines.storage import store
from tests.support.fetched import fetch_images
from tests.support.rows import list_input, make_config
from tests.support.tars import write_tar


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("a{8..11}.tar", ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{a..c}{,x}", ["a", "ax", "b", "bx", "c", "cx"]),
        ("{a,b{1..2},{c,d}e}", ["a", "b1", "b2", "ce", "de"]),
        ("{train,val}/{0..1}::c.tar", ["train/0", "train/1", "val/0", "val/1", "c.tar"]),
        ("{a}/{}/{b{1,2}}", ["{a}/{}/{b1}", "{a}/{}/{b2}"]),
        ("{a,b", ["{a,b"]),
    ],
)
def test_braces_are_expanded_as_by_a_shell(text: str, names: list[str]) -> None:
    assert expand_names(text) == names


@given(st.text(alphabet="{},.a10:", max_size=12))
def test_any_text_is_expanded_or_refused(text: str) -> None:
    try:
        assert expand_names(text)
    except SourceError as error:
        assert "more than" in str(error)


@pytest.mark.parametrize("text", ["{0..1000000}", "{0..999}{0..9999}"])
def test_too_many_names_are_refused(text: str) -> None:
    with pytest.raises(SourceError, match="more than 1,000,000 names"):
        expand_names(text)


def pack(path: Path, members: dict[str, bytes]) -> Path:
    return write_tar(path, list(members.items()))


def write_shards(root: str, tmp_path: Path) -> None:
    for i in range(8, 12):
        pack(tmp_path / "x.tar", {f"{i}.png": b"1"})
        store.write_bytes(f"{root}/a{i:02}.tar", (tmp_path / "x.tar").read_bytes())


def check_braces(root: str) -> None:
    assert len(list_input(f"{root}/a{{08..11}}.tar")) == 4
    assert [row["id"] for row in list_input(f"{root}/a{{11,08}}.tar")] == [f"{root}/a11.tar#11", f"{root}/a08.tar#8"]
    assert len(list_input(f"{root}/a08.tar::{root}/a1{{0..1}}.tar")) == 3
    with pytest.raises(SourceError, match=r"3 of 6 names in .* cannot be found, the first is .*a12\.tar"):
        list_input(f"{root}/a{{09..14}}.tar")


def test_a_range_of_shards_is_listed_in_order(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "s"), tmp_path)
    check_braces(str(tmp_path / "s"))


def test_a_range_of_shards_in_a_store(bucket: object, tmp_path: Path) -> None:
    write_shards("s3://bucket/s", tmp_path)
    check_braces("s3://bucket/s")


def test_names_that_really_have_braces_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("{0..1}.png", "a::b.png", "{x,y}/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    for name in ("{0..1}.png", "a::b.png", "{x,y}", "{x,y}/*.png"):
        assert len(list_input(tmp_path / name)) == 1


@pytest.mark.parametrize("uri", ["pipe:cat a.tar", "pipe:gsutil cat gs://b/{00..99}.tar"])
def test_commands_are_refused(uri: str) -> None:
    with pytest.raises(StoreError, match=r"commands .* are not run; give the URL"):
        list_input(uri)


DOTTED = {f"www.example.com_{i}.png": b"%d" % i for i in range(4)}


def test_keys_with_several_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(tmp_path / "a.tar", {**DOTTED, "one.png": b"1"})
    [grouped, _] = list_input(tmp_path / "a.tar")
    assert len(grouped["images"]) == 4
    assert "1 key in tars with several images each, 4 in total" in caplog.text and "--group-by file" in caplog.text
    run = open_run(make_config(tmp_path / "a.tar", output=str(tmp_path / "out")), {"id": "demo", "revision": None})
    assert run.record["num_keys_with_several_images"] == 1


def test_images_can_be_rows_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {**DOTTED, "www.example.com_2.json": b'{"n": 2}', "b.jpg": b"b", "b.png": b"c", "b.json": b'{"n": 7}'}
    pack(tmp_path / "a.tar", members)
    rows = list_input(tmp_path / "a.tar", group_by="file", keep_columns=("n",))
    names = [row["id"].partition("#")[2] for row in rows]
    assert names == [*(f"www.example.com_{i}" for i in range(4)), "b", "b~2"]
    assert fetch_images(rows) == [[b"0"], [b"1"], [b"2"], [b"3"], [b"b"], [b"c"]]
    assert [row["kept"]["n"] for row in rows] == [None, None, 2, None, 7, 7]
    assert "several images" not in caplog.text


def test_grouping_decides_rows_but_old_runs_resume(tmp_path: Path) -> None:
    assert "group_by" not in make_config("in").fingerprint_fields()
    assert make_config("in", group_by="file").fingerprint_fields()["group_by"] == "file"


@pytest.mark.parametrize(("name", "is_packed"), [("a.tar", True), ("a.tar.gz", False), ("a.tgz", False)])
def test_the_content_of_a_tar_decides(
    name: str, is_packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(tmp_path / "x.tar", {"1.png": b"one"})
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if is_packed else data)
    rows = list_input(tmp_path / name)
    assert fetch_images(rows) == [[b"one"]]
    assert caplog.text.count("as its name says; it is read as such") == 1


@pytest.mark.parametrize("magic", [b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"])
def test_other_compressions_are_named(magic: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(magic + bytes(1024))
    [row] = list_input(tmp_path / "a.tar")
    assert "convert it to .tar or .tar.gz" in row["error"]


def test_hidden_members_are_no_rows(tmp_path: Path) -> None:
    members = dict.fromkeys(("./a.png", "._a.png", ".cache/b.png", "__MACOSX/c.png", "_d.png", "_d.json"), b"{}")
    pack(tmp_path / "a.tar", members)
    assert [row["id"].partition("#")[2] for row in list_input(tmp_path / "a.tar")] == ["./a", "_d"]


def write_img2dataset(root: Path) -> None:
    """Write two shards as img2dataset does; the second table lacks a key."""
    for shard, keys in (("00000", ("000000000", "000000001")), ("00001", ("000010000", "000010001"))):
        pack(root / f"{shard}.tar", {f"{key}.jpg": key.encode() for key in keys})
        listed = keys[:1] if shard == "00001" else keys[::-1]
        table = {"key": listed, "caption": [f"of {key}" for key in listed], "width": [len(key) for key in listed]}
        pq.write_table(pa.table(table), root / f"{shard}.parquet")
        (root / f"{shard}_stats.json").write_text("{}")


def test_tables_next_to_tars_give_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_img2dataset(tmp_path)
    for uri in (tmp_path, tmp_path / "*.tar", tmp_path / "{00000..00001}.tar"):
        caplog.clear()
        rows = list_input(uri, keep_columns=("caption", "width"), prompt_column="caption", id_column="key")
        assert [row["id"] for row in rows[:3]] == ["000000000", "000000001", "000010000"]
        assert [row["prompt"] for row in rows] == [
            "of 000000000",
            "of 000000001",
            "of 000010000",
            "Describe the image.",
        ]
        assert [row["kept"]["width"] for row in rows] == [9, 9, 9, None]
        assert "00001.parquet has no row for 1 key of" in caplog.text
    assert len(list_input(tmp_path)) == 4


def test_a_sidecar_has_precedence_over_the_table(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"1.jpg": b"1", "1.json": b'{"caption": "mine"}', "2.jpg": b"2"})
    pq.write_table(pa.table({"key": ["1", "2"], "caption": ["a", "b"]}), tmp_path / "a.parquet")
    assert [row["kept"]["caption"] for row in list_input(tmp_path, keep_columns=("caption",))] == ["mine", "b"]


def test_a_table_without_keys_is_none_of_the_tar(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"1.jpg": b"1"})
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="caption"):
        list_input(tmp_path / "a.tar", keep_columns=("caption",))


def test_packed_and_plain_tars_are_one_input(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"1.jpg": b"1"})
    for name in ("b.tar.gz", "c.tgz"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert fetch_images(list_input(tmp_path)) == [[b"1"]] * 3
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "d.parquet")
    with pytest.raises(SourceError, match=r"several kinds \(parquet, tar\)"):
        list_input(tmp_path)
