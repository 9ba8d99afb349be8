"""Parquet and Arrow files of any schema: images in every Arrow type, shards without values, damaged shards."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.errors import SourceError
from tests.support.fetched import fetch_images
from tests.support.parquet_files import write
from tests.support.rows import list_input

_PATHS = pa.struct([("bytes", pa.null()), ("path", pa.string())])
_BOTH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_LISTS = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
_GIF = b"GIF89a" + bytes(60)
_BASE64 = base64.b64encode(_GIF).decode()
_DATA = f"data:image/gif;base64,{_BASE64}"
_COLUMNS: dict[str, pa.Array] = {
    **{str(t): pa.array([b"one", None], t) for t in (pa.binary(3), pa.binary_view(), pa.large_binary())},
    **{str(t): pa.array(["x.png", None], t) for t in (pa.string_view(), pa.large_string())},
    "dictionary of bytes": pa.array([b"one", None]).dictionary_encode(),
    "dictionary of text": pa.array(["x.png", None]).dictionary_encode(),
    "path": pa.array([{"path": "x.png"}, None]),
    "null bytes": pa.array([{"bytes": None, "path": "x.png"}, {"bytes": None, "path": None}], _PATHS),
    "bytes or path": pa.array([{"bytes": None, "path": "x.png"}, {"bytes": None, "path": None}], _BOTH),
    "fixed_size_list": pa.array([[b"one"], None], pa.list_(pa.binary(), 1)),
    **{f"{make.__name__} of bytes": pa.array([[b"one"], []], make(pa.binary())) for make in _LISTS},
    **{f"{make.__name__} of text": pa.array([["x.png"], None], make(pa.string_view())) for make in _LISTS},
    **{f"{make.__name__} of paths": pa.array([[{"path": "x.png"}], []], make(_PATHS)) for make in _LISTS},
    "json": pa.array(["x.png", None], pa.json_()),
    "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.binary(), "image", "a"), pa.array([b"one", None])),
}
_ONLY_IN_PARQUET = {name for name in _COLUMNS if name.startswith("dictionary")}


def _write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        return write(path, table)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("options", [{}, {"image_column": "image"}])
def test_images_are_read_from_columns_of_every_type(tmp_path: Path, options: dict[str, Any], suffix: str) -> None:
    (tmp_path / "x.png").write_bytes(b"one")
    for name, column in _COLUMNS.items():
        if suffix == ".arrow" and name in _ONLY_IN_PARQUET:
            continue
        rows = list_input(_write(tmp_path / f"a{suffix}", pa.table({"image": column})), **options)
        assert fetch_images(rows) == [[b"one"], []], name


@pytest.mark.parametrize(
    "type_", [pa.null(), pa.struct([("bytes", pa.null()), ("path", pa.null())]), pa.list_(pa.null())]
)
def test_rows_of_a_column_without_values_have_no_image(tmp_path: Path, type_: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.nulls(2, type_), "q": ["Why?", None]})
    for options in ({}, {"image_column": "image"}):
        rows = list_input(path, prompt_column="q", **options)
        assert [(row["images"], bool(row["error"])) for row in rows] == [([], False), ([], True)]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_shard_without_rows_needs_no_columns(tmp_path: Path, suffix: str) -> None:
    good = _write(tmp_path / f"b{suffix}", pa.table({"image": [b"1"], "c": [1]}))
    for i, table in enumerate(
        (pa.table({}), pa.table({"image": pa.nulls(0)}), pa.table({"x": pa.array([], pa.int8())}))
    ):
        empty = _write(tmp_path / f"a{i}{suffix}", table)
        assert [row["id"] for row in list_input(empty, good, keep_columns=("c",))] == [f"{good}#0"]
    with pytest.raises(SourceError, match="no rows in"):
        list_input(empty)


def test_fixed_size_bytes_do_not_compete_with_images(tmp_path: Path) -> None:
    table = pa.table(
        {"sha": pa.array([b"12345678"], pa.binary(8)), "id": pa.array([b"1" * 16], pa.uuid()), "i": [b"1"]}
    )
    assert fetch_images(list_input(write(tmp_path / "a.parquet", table))) == [[b"1"]]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("text", [_DATA, _BASE64])
def test_inline_images_are_read_and_stay_out_of_the_manifest(tmp_path: Path, text: str, suffix: str) -> None:
    columns = ([text], [[text, text]], [{"bytes": None, "path": text}], [{"bytes": text, "path": None}])
    for column in columns:
        rows = list_input(_write(tmp_path / f"a{suffix}", pa.table({"image": pa.array(column)})))
        assert fetch_images(rows) == [[_GIF] * (2 if isinstance(column[0], list) else 1)]
        assert _BASE64 not in str(rows)
    broken = list_input(_write(tmp_path / f"a{suffix}", pa.table({"image": [text.rstrip("=") + "A"]})))
    with pytest.raises(OSError, match=r"cannot be") as caught:
        fetch_images(broken)
    assert _BASE64[20:] not in str(caught.value)


def _damage(path: Path, kind: str) -> Path:
    data = path.read_bytes()
    half = len(data) // 2
    damaged = {
        "empty": b"",
        "text": b"<html>404</html>",
        "truncated": data[:half],
        "overwritten end": data[:-60] + b"\xff" * 60,
        "encrypted": b"PARE" + data[4:-4] + b"PARE",
    }
    path.write_bytes(damaged[kind])
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "overwritten end", "encrypted"])
def test_a_damaged_shard_among_good_ones_is_an_error_row(
    tmp_path: Path, suffix: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = pa.table({"image": [b"1"], "c": [1]})
    good = [_write(tmp_path / f"{name}{suffix}", table) for name in "ac"]
    bad = _damage(_write(tmp_path / f"b{suffix}", table), kind)
    with caplog.at_level(logging.WARNING):
        rows = list_input(good[0], bad, good[1], keep_columns=("c",))
    assert [row["kept"]["c"] for row in rows if not row["error"]][-1] == 1
    [error] = [row for row in rows if row["error"]]
    assert error["uri"] == str(bad) and f"cannot read {bad} as " in error["error"]
    assert [row["id"] for row in rows if row["uri"] != str(bad)] == [f"{path}#0" for path in good]
    if suffix == ".parquet":
        assert error["id"] == str(bad) and "1 unreadable shard is an error row" in caplog.text
        assert ("encrypted" in error["error"]) == (kind == "encrypted")


def test_a_run_of_nothing_but_damaged_shards_is_refused(tmp_path: Path) -> None:
    paths = [_damage(write(tmp_path / f"{name}.parquet", {"image": [b"1"]}), "text") for name in "ab"]
    with pytest.raises(SourceError, match=r"none of the 2 shards can be read. The first: cannot read .*a\.parquet"):
        list_input(*paths)
    with pytest.raises(SourceError, match=r"^cannot read .*a\.parquet as Parquet"):
        list_input(paths[0])


def test_rows_before_the_damage_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, pa.schema([("image", pa.binary())])) as writer:
        for i in range(3):
            writer.write_table(pa.table({"image": [bytes([i]) * 500]}))
    path.write_bytes(path.read_bytes()[:-300])
    rows = list_input(path)
    assert [row["id"] for row in rows] == [f"{path}#{i}" for i in range(3)]
    assert [bool(row["error"]) for row in rows] == [False, False, True]
    assert "from row 2 on no row is listed" in rows[2]["error"]


def test_lists_of_lists_are_not_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"path": pa.array([[["a.jpg"]]])})
    with pytest.raises(SourceError, match="no column seems to hold the images"):
        list_input(path)
    with pytest.raises(SourceError, match="column 'path' holds neither bytes nor URIs"):
        list_input(path, image_column="path")


def test_messages_about_wide_tables_stay_short(tmp_path: Path) -> None:
    fields = pa.struct([(f"field {i}", pa.int64()) for i in range(500)])
    path = write(tmp_path / "a.parquet", pa.table({f"c{i}": pa.nulls(1, fields) for i in range(40)}))
    with pytest.raises(SourceError, match=r"it has c0 \(struct<.*\.\.\.\), .*, 20 more$") as caught:
        list_input(path)
    assert len(str(caught.value)) < 1500


def test_values_without_a_text_are_refused_by_column(tmp_path: Path) -> None:
    columns = {"image": [b"1"], "taken": pa.array([1 << 30], pa.date32())}
    with pytest.raises(SourceError, match=r"values of taken cannot be written as text .*taken \(date32\[day\]\)"):
        list_input(write(tmp_path / "a.parquet", columns), prompt_column="taken")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"\x16\x06\x19", b"\x16\x05\x19", "its numbers of rows contradict each other"),
        (b"label", b"\xff\xfe\xffel", "it holds text that is not UTF-8"),
        (b"PAR1\x15", b"PAR1\x1e", "Couldn't deserialize thrift: .*page header failed"),
    ],
    ids=["number of rows", "name", "page header"],
)
def test_damage_is_one_sentence(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    path = write(tmp_path / "a.parquet", {"label": ["a", "b", "c"]}, store_schema=False, compression="none")
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(SourceError, match=rf"^cannot read .*a\.parquet as Parquet: {reason}[^\n]*$"):
        list_input(path, image_column="", prompt_column="label")
