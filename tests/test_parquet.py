"""Parquet: the choice of the image column, when data is read, and that column types survive."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import SourceError
from pipelines.media.fetch import Fetcher
from pipelines.media.readers import ParquetReader
from pipelines.media.reference import parse_reference
from pipelines.sources import list_rows
from tests.support.fetched import fetch_images, is_refused
from tests.support.parquet_files import HF, make_kept_columns, write
from tests.support.rows import list_input, make_config


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_binary_columns_hold_one_image_per_row(tmp_path: Path, type_: pa.DataType) -> None:
    values = [bytes([i]) for i in range(50)]
    path = write(tmp_path / "a.parquet", {"jpg": pa.array(values, type_), "n": range(50)}, row_group_size=7)
    rows = list_input(path)
    assert [row["id"] for row in rows] == [f"{path}#{i}" for i in range(50)]
    assert fetch_images(rows) == [[value] for value in values]
    assert fetch_images(rows[::-1]) == [[value] for value in values[::-1]]


def test_hugging_face_structs_and_lists_of_them_are_images(tmp_path: Path) -> None:
    (tmp_path / "named.jpg").write_bytes(b"named")
    one = [{"bytes": b"1", "path": "1.jpg"}, {"bytes": None, "path": "named.jpg"}, None, {"bytes": None, "path": None}]
    rows = list_input(write(tmp_path / "a.parquet", {"image": pa.array(one, HF)}))
    assert fetch_images(rows) == [[b"1"], [b"named"], [], []]
    many = [[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}], [], None, [{"bytes": b"3", "path": None}]]
    rows = list_input(write(tmp_path / "b.parquet", {"images": pa.array(many, pa.list_(HF))}))
    assert fetch_images(rows) == [[b"1", b"2"], [], [], [b"3"]]
    rows = list_input(write(tmp_path / "c.parquet", {"images": pa.array([[b"1", None]], pa.list_(pa.binary()))}))
    with pytest.raises(OSError, match="image 2 of 2 in row 0"):
        fetch_images(rows)


def test_string_columns_hold_uris(tmp_path: Path) -> None:
    table = {"url": ["a.jpg", "s3://b/c.jpg", None, None], "q": [None, "Why?", "What?", None]}
    rows = list_input(write(tmp_path / "a.parquet", table), prompt_column="q")
    assert [row["uri"] for row in rows] == [f"{tmp_path}/a.jpg", "s3://b/c.jpg", *[f"{tmp_path}/a.parquet"] * 2]
    assert [row["prompt"] for row in rows[:3]] == ["Describe the image.", "Why?", "What?"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True]
    several = {"pics": [["a", "b"], []], "q": ["1", "2"]}
    rows = list_input(write(tmp_path / "b.parquet", several), prompt_column="q", image_column="pics")
    assert [len(row["images"]) for row in rows] == [2, 0]
    dictionary = {"path": pa.array(["a", "b", "a"]).dictionary_encode()}
    rows = list_input(write(tmp_path / "c.parquet", dictionary))
    assert [Path(row["uri"]).name for row in rows] == ["a", "b", "a"]


def test_the_image_column_is_guessed_only_if_it_is_unambiguous(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a, b may all hold the images.*--image-column"):
        list_input(write(tmp_path / "a.parquet", {"a": [b"1"], "b": [b"2"]}))
    with pytest.raises(SourceError, match=r"no column seems to hold the images.*caption \(string\)"):
        list_input(write(tmp_path / "b.parquet", {"caption": ["x"]}))
    with pytest.raises(SourceError, match=r"column 'n' holds neither bytes nor URIs"):
        list_input(write(tmp_path / "c.parquet", {"n": [1]}), image_column="n")
    [row] = list_input(tmp_path / "b.parquet", image_column="", prompt_column="caption")
    assert (row["images"], row["prompt"], row["error"]) == ([], "x", "")


def test_ids_come_from_a_column_and_may_not_repeat(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"1", b"2", b"3"], "key": [7, None, 9], "same": ["x", "x", "y"]})
    assert [row["id"] for row in list_input(path, id_column="key")] == ["7", f"{path}#1", "9"]
    with pytest.raises(SourceError, match=r"1 row repeats an id.*--id-column.*x \(2 times\)"):
        list_input(path, id_column="same")


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"1"], "kind": ["a"]})
    for options in ({"keep_columns": "nowhere"}, {"id_column": "nowhere"}, {"prompt": "A {nowhere}?"}):
        with pytest.raises(SourceError, match=r"has no column nowhere.*it has image \(binary\), kind \(string\)"):
            list_input(path, **options)
    assert list_input(path, prompt="A {kind}, {{}}?")[0]["prompt"] == "A a, {}?"


def test_kept_columns_keep_their_types(tmp_path: Path) -> None:
    columns = make_kept_columns(3)
    write(tmp_path / "a.parquet", {"image": pa.array([b"1"] * 3), **columns})
    config = make_config(tmp_path / "a.parquet", image_column="image", keep_columns=tuple(columns))
    with list_rows(config, config.questionnaire) as listing:
        [table] = listing.read_tables()
    assert {field.name: field.type for field in table.schema.field("kept").type} == {
        name: array.type for name, array in columns.items()
    }
    assert table.column("kept").to_pylist() == pa.table(columns).to_pylist()


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match=r"cannot read .*a\.parquet as Parquet"):
        list_input(tmp_path / "a.parquet")


def test_a_damaged_row_group_gives_error_rows(tmp_path: Path) -> None:
    import random

    noise = random.Random(0).randbytes
    path = write(
        tmp_path / "a.parquet",
        {"image": [noise(2000) for _ in range(90)]},
        row_group_size=30,
        compression="snappy",
        use_dictionary=False,
    )
    rows = list_input(path)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    fetcher, outcomes = Fetcher(), []
    for row in rows:
        future = fetcher.submit([parse_reference(image) for image in row["images"]])
        outcomes.append(is_refused(future))
    assert outcomes == [False] * 30 + [True] * 30 + [False] * 30


def test_no_image_is_read_while_listing(tmp_path: Path) -> None:
    table = {"image": [bytes([i]) * 100_000 for i in range(20)], "key": [f"k{i}" for i in range(20)]}
    path = write(tmp_path / "a.parquet", table, compression="none")
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 1_000_000] = b"\xff" * 1_000_000
    path.write_bytes(data)
    assert [row["id"] for row in list_input(path, id_column="key")] == [f"k{i}" for i in range(20)]


def test_two_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"1"]), pa.array([1]), pa.array([2])], names=["image", "c", "c"])
    with pytest.raises(SourceError, match="several columns named c"):
        list_input(write(tmp_path / "a.parquet", table))


def test_a_temporary_fault_causes_no_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [bytes([i]) for i in range(200)]
    rows = list_input(write(tmp_path / "a.parquet", {"image": values}))
    advance, faults = ParquetReader._advance, iter([False] * 70 + [True] + [False] * 1000)

    def advance_or_fail(self: ParquetReader, row: int) -> None:
        if next(faults):
            raise OSError("connection reset")
        advance(self, row)

    monkeypatch.setattr(ParquetReader, "_advance", advance_or_fail)
    assert fetch_images(rows) == [[value] for value in values]


def test_a_missing_file_does_not_affect_the_file_before_it(tmp_path: Path) -> None:
    values = [bytes([i]) for i in range(40)]
    first = list_input(write(tmp_path / "a.parquet", {"image": values}))
    gone = list_input(write(tmp_path / "b.parquet", {"image": values}))
    (tmp_path / "b.parquet").unlink()
    fetcher = Fetcher()
    assert fetch_images(first[:20], fetcher) == [[value] for value in values[:20]]
    with pytest.raises(OSError, match=r"b\.parquet"):
        fetch_images(gone[:1], fetcher)
    assert fetch_images(first[20:], fetcher) == [[value] for value in values[20:]]
