"""JSON files are split into lines or elements of an array with bounded memory, at the right offsets."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import SourceError
from pipelines.sources.json_elements import Element, split_array, split_lines
from tests.support.rows import list_input

JSON: Any = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class SmallBlocks:
    """A file that returns a few bytes at a time."""

    def __init__(self, data: bytes, block_bytes: int) -> None:
        self._file, self._block_bytes = io.BytesIO(data), block_bytes

    def read(self, _: int) -> bytes:
        return self._file.read(self._block_bytes)


def split(data: bytes, *, block_bytes: int = 7, max_bytes: int = 1000) -> list[Element]:
    return list(split_array(SmallBlocks(data, block_bytes).read, max_bytes))


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_every_element_is_found_at_its_offset(values: list[Any], indent: int | None, ascii: bool, block: int) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    elements = split(data, block_bytes=block, max_bytes=1 << 20)
    assert [json.loads(element.data) for element in elements] == values
    assert all(data[e.offset : e.offset + len(e.data)] == e.data for e in elements)
    assert [element.number for element in elements] == list(range(len(values)))


@pytest.mark.parametrize(
    "bad", [b"{'a': 1}", b'{"a": undefined}', b'{"a": "}",}', b"nope", b'{"a" 1}', b'[1 "]" 2]', b'{"x": "\\"\\\\", }']
)
@pytest.mark.parametrize("block_bytes", [1, 5, 1000])
def test_an_element_that_is_not_json_fails_alone(bad: bytes, block_bytes: int) -> None:
    first, broken, last = split(b'[{"n": 1},' + bad + b', {"n": 2}]', block_bytes=block_bytes)
    assert not first.error and broken.error.startswith("not JSON") and json.loads(last.data) == {"n": 2}


def test_what_cannot_be_split_ends_in_one_error() -> None:
    assert [bool(e.error) for e in split(b'[{"n": 1}, {"a": "x}, {"n": 2}]')] == [False, True]
    assert "truncated" in split(b'[{"n": 1}')[-1].error and "truncated" in split(b"[")[-1].error
    assert "not read" in split(b'[{"n": 1}] {"n": 2}')[-1].error
    assert split(b"[]\n") == []


def test_a_long_element_is_skipped_with_bounded_memory() -> None:
    long = b'{"a": "' + b"x" * 100_000 + b'"}'
    before, error, after = split(b'[{"n": 1},' + long + b',{"n": 2}]', block_bytes=64)
    assert (before.error, error.error, after.error) == ("", "longer than 1,000 bytes", "") and error.data == b""


def test_nesting_is_bounded() -> None:
    [error, good] = split(b"[" + b"[" * 100_000 + b"]" * 100_000 + b",{}]", max_bytes=1 << 20, block_bytes=9999)
    assert "nested too deeply" in error.error and good.data == b"{}"


def test_lines_have_offsets_and_a_limit() -> None:
    data = b'\n{"a": 1}\n' + b"x" * 5000 + b"\r\n" + '{"ü": 2}\n'.encode() + b"last"
    lines = list(split_lines(SmallBlocks(data, 11).read, 1000))
    assert [line.number for line in lines] == [2, 3, 4, 5] and "longer" in lines[1].error
    assert all(data[e.offset : e.offset + len(e.data)] == e.data for e in lines)


@pytest.mark.parametrize("name", ["a.ndjson", "a.json", "a.ndjson.gz", "a.json.gz", "a.JSON"])
def test_suffixes_of_json_lines(tmp_path: Path, name: str) -> None:
    data = b'\xef\xbb\xbf{"image": "1.png"}\n{broken\n\n{"image": "2.png"}'
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = list_input(path)
    assert [row["id"] for row in rows] == [f"{path}#{n}" for n in (1, 2, 4)] and rows[1]["error"].startswith("line 2: ")


def test_an_array_makes_rows_numbered_from_0(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"image": "1.png"}, 5, {"image": "2.png", "id": "x"}, {"prompt": ""}]')
    rows = list_input(path)
    assert [row["id"] for row in rows] == [f"{path}#0", f"{path}#1", "x", f"{path}#3"]
    assert [row["error"].split(":")[0] for row in rows] == ["", "element 1", "", "element 3"]


def test_one_object_over_several_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [{"file_name": "1.png"}]}, indent=2))
    with pytest.raises(SourceError, match="neither an array of objects nor one object per line"):
        list_input(path)


def test_a_json_next_to_other_shards_is_not_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "1.png"}')
    (tmp_path / "info.json").write_text("{}")
    assert len(list_input(tmp_path)) == 1
