"""Rows listed as Arrow columns equal those listed one by one, whatever stands among the plain ones."""

from __future__ import annotations

import base64
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import SourceError
from pipelines.media.subtitles import MARK_START, MARK_STOP
from pipelines.sources import jsonl, tables
from pipelines.sources.hashes import combine_hashes, hash_places, hash_texts
from pipelines.sources.rows import Chunk
from tests.support.jsonl_files import write_lines
from tests.support.parquet_files import HF, write
from tests.support.pictures import encode_picture
from tests.support.rows import list_input

INLINE = base64.b64encode(encode_picture(0)).decode()


def make_lines(*special: bytes) -> bytes:
    plain = [json.dumps({"id": f"id{i}", "image": f"a/{i}.jpg", "prompt": f"what is {i}?"}).encode() for i in range(6)]
    return b"\n".join([*plain[:3], *special, *plain[3:]])


LINES = {
    "plain": b'{"id": "x", "image": "/abs/x.jpg", "prompt": "a \xc3\xa9 \\u00e9"}',
    "url": b'{"id": "x", "image": "https://h/x.jpg?a=1", "prompt": "p"}',
    "integer id": b'{"id": 7, "image": "x.jpg", "prompt": "p"}',
    "float id": b'{"id": 7.0, "image": "x.jpg", "prompt": "p"}',
    "boolean id": b'{"id": true, "image": "x.jpg", "prompt": "p"}',
    "moment as id": b'{"id": "2020-01-02 03:04:05", "image": "x.jpg", "prompt": "p"}',
    "huge number": b'{"id": 123456789012345678901234567890, "image": "x.jpg", "prompt": "p"}',
    "no id": b'{"image": "x.jpg", "prompt": "p"}',
    "null prompt": b'{"id": "x", "image": "x.jpg", "prompt": null}',
    "empty prompt": b'{"id": "x", "image": "x.jpg", "prompt": ""}',
    "empty id": b'{"id": "", "image": "x.jpg", "prompt": "p"}',
    "no image": b'{"id": "x", "prompt": "p"}',
    "empty image": b'{"id": "x", "image": "", "prompt": "p"}',
    "number as image": b'{"id": "x", "image": 5, "prompt": "p"}',
    "list of images": b'{"id": "x", "image": ["x.jpg", "y.jpg"], "prompt": "p"}',
    "second image field": b'{"id": "x", "image": "x.jpg", "images": "y.jpg", "prompt": "p"}',
    "further field": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": 1.5}',
    "float": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": 0.1, "n": 3}',
    "whole float": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": 1}\n'
    b'{"id": "y", "image": "y.jpg", "prompt": "p", "score": 1.5}',
    "huge whole float": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": 9007199254740993}\n'
    b'{"id": "y", "image": "y.jpg", "prompt": "p", "score": 1.5}',
    "huge score": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": 123456789012345678901234567890}',
    "infinite": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": 1e999}',
    "negative zero": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": -0, "n": [-0 ]}',
    "null score": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": null}',
    "text and number": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": "a"}\n'
    b'{"id": "y", "image": "y.jpg", "prompt": "p", "score": 1.5}',
    "nested field": b'{"id": "x", "image": "x.jpg", "prompt": "p", "score": {"a": [1, {"b": null}]}, "tags": ["t"]}',
    "other nested field": b'{"id": "x", "image": "x.jpg", "prompt": "p", "meta": {"url": "y.jpg"}, "tags": []}',
    "deep field": b'{"id": "x", "image": "x.jpg", "prompt": "p", "meta": ' + b"[" * 45 + b"]" * 45 + b"}",
    "nested image": b'{"id": "x", "image": {"path": "x.jpg"}, "prompt": "p"}',
    "nested prompt": b'{"id": "x", "image": "x.jpg", "prompt": {"a": 1}}',
    "null url": b'{"id": "x", "image": "x.jpg", "prompt": "p", "url": null}',
    "null id": b'{"id": null, "image": "x.jpg", "prompt": "p"}',
    "mark of subtitles": f'{{"id": "x", "image": "x.jpg", "prompt": "a{MARK_START}b{MARK_STOP}"}}'.encode(),
    "null turns": b'{"id": "x", "image": "x.jpg", "prompt": "p", "messages": null}',
    "plain body": b'{"id": "x", "image": "x.jpg", "prompt": "p", "body": {"a": 1}}',
    "repeated field": b'{"id": "x", "id": "y", "image": "x.jpg", "prompt": "p"}',
    "conversation": b'{"id": "x", "image": "x.jpg", "messages": [{"role": "user", "content": "q"}]}',
    "dots": b'{"id": "x", "image": "../b/./x.jpg", "prompt": "p"}',
    "no suffix": b'{"id": "x", "image": "x", "prompt": "p"}',
    "window": b'{"id": "x", "image": "x.mp4#t=1,2", "prompt": "p"}',
    "video": b'{"id": "x", "image": "x.mp4", "prompt": "p"}',
    "data": b'{"id": "x", "image": "data:image/png;base64,' + INLINE.encode() + b'", "prompt": "p"}',
    "base64": b'{"id": "x", "image": "' + INLINE.encode() + b'", "prompt": "p"}',
    "surrogate": b'{"id": "x", "image": "x.jpg", "prompt": "\\ud800"}',
    "not UTF-8": b'{"id": "x", "image": "x.jpg", "prompt": "\xff"}',
    "not JSON": b'{"id": "x", "image": "x.jpg", "prompt": }',
    "control character": b'{"id": "x", "image": "x.jpg", "prompt": "a\tb"}',
    "not a number": b'{"id": "x", "image": "x.jpg", "prompt": NaN}',
    "two objects": b'{"id": "x", "image": "x.jpg", "prompt": "p"}{"id": "y", "image": "y.jpg", "prompt": "p"}',
    "over two lines": b'{"id": "x", "image": "x.jpg",\n"prompt": "p"}',
    "list": b"[1]",
    "empty object": b"{}",
    "blank": b"  ",
    "mark": b'\xef\xbb\xbf{"id": "x", "image": "x.jpg", "prompt": "p"}',
    "long": b'{"id": "x", "image": "x.jpg", "prompt": "' + b"p" * 5000 + b'"}',
    "wrapped": b'{"custom_id": "x", "body": {"messages": [{"role": "user", "content": "q"}], "image": "x.jpg"}}',
}


def list_both_ways(monkeypatch: pytest.MonkeyPatch, *inputs: object, **options: object) -> list[Any]:
    """List rows with and without the plain way -> the rows or the error of each."""
    ways = [list_or_fail(*inputs, **options)]
    monkeypatch.setattr(jsonl, "make_plain_chunk", lambda *_: None)
    monkeypatch.setattr(tables.TableShard, "_make_columns", lambda *_: None)
    return [*ways, list_or_fail(*inputs, **options)]


def list_or_fail(*inputs: object, **options: object) -> Any:
    try:
        return list_input(*inputs, **options)
    except SourceError as error:
        return str(error)


OPTIONS: list[dict[str, object]] = [
    {"prompt_column": "prompt"},
    {},
    {"keep_columns": ("image",)},
    {"keep_columns": ("score",)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LINES)
def test_lines_are_listed_alike(
    name: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(make_lines(LINES[name]))
    plain, others = list_both_ways(monkeypatch, tmp_path / "rows.jsonl", **options)
    assert plain == others


@pytest.mark.parametrize("prompt", ["{{{{{id}}}}} is {question}?", "{score} of {id}"])
@pytest.mark.parametrize("name", LINES)
def test_lines_that_fill_prompts_are_listed_alike(
    name: str, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(make_lines(LINES[name]).replace(b'"prompt"', b'"question"'))
    plain, others = list_both_ways(monkeypatch, tmp_path / "rows.jsonl", prompt=prompt)
    assert plain == others


def test_broken_lines_do_not_make_up_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines hold half an object each, and another holds two."""
    (tmp_path / "rows.jsonl").write_bytes(make_lines(LINES["over two lines"], LINES["two objects"]))
    plain, others = list_both_ways(monkeypatch, tmp_path / "rows.jsonl")
    assert plain == others and sum(bool(row["error"]) for row in plain) == 3


def test_text_only_and_filled_prompts_are_listed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes(make_lines())
    for options in (
        {"prompt_column": "prompt", "image_column": ""},
        {"prompt": "{id} {{?}}"},
        {"prompt": "what {{?}}"},
        {"id_column": "prompt", "limit": 4},
        {"keep_columns": ("missing",)},
    ):
        with monkeypatch.context() as patch:
            plain, others = list_both_ways(patch, tmp_path / "rows.jsonl", **options)
        assert plain == others, options


MOMENT = datetime.datetime(2020, 1, 2)
COLUMNS: dict[str, dict[str, Any]] = {
    "bytes": {"image": pa.array([{"bytes": b"x", "path": None}] * 5, HF), "label": [*"vwxyz"]},
    "bytes and ids": {"jpg": [b"x"] * 5, "id": [*"abcde"], "prompt": [*"pqrst"]},
    "urls": {"url": [f"https://h/{i}.jpg" for i in range(5)], "id": range(5), "prompt": [*"pqrst"]},
    "paths": {"image": ["a.jpg", "/b.jpg", "../c.jpg", "./d.jpg", "s3://b/c/../e.jpg"]},
    "null path": {"image": ["a.jpg", None, "c.jpg", "", "e.jpg"], "prompt": [*"pqrst"]},
    "windows": {"image": ["a.mp4#t=1,2", "b.mp4#t=x", "c.mp4", "d.jpg", "e.jpg"]},
    "inline": {"image": ["a.jpg", INLINE, f"data:image/png;base64,{INLINE}", "d.jpg", "e.jpg"]},
    "null id": {"image": [f"{i}.jpg" for i in range(5)], "id": [*"abc", None, ""]},
    "null prompt": {"image": [f"{i}.jpg" for i in range(5)], "prompt": [*"pq", "", None, "t"]},
    "float id": {"image": [f"{i}.jpg" for i in range(5)], "id": [0.5, 1.0, 2.0, 3.0, 4.0]},
    "moment as id": {"image": [f"{i}.jpg" for i in range(5)], "id": [MOMENT] * 5},
    "bytes as prompt": {"image": [f"{i}.jpg" for i in range(5)], "prompt": [b"\xff", b"b", b"", b"d", None]},
    "long texts": {"image": pa.array([f"{i}.jpg" for i in range(5)], pa.large_string()), "id": [*"abcde"]},
    "lists": {"images": [["a.jpg"], ["b.jpg", "c.jpg"], [], None, ["e.jpg"]], "prompt": [*"pqrst"]},
    "text": {"prompt": [*"pqrst"]},
    "text and null": {"prompt": ["p", None, "", "s", "t"]},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_tables_are_listed_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = COLUMNS[name]
    path = write(tmp_path / "rows.parquet", columns, row_group_size=2)
    options: dict[str, object] = {"id_column": "id"} if "id" in columns else {}
    options |= {"prompt_column": "prompt"} if "prompt" in columns else {}
    options |= {"image_column": ""} if columns.keys() == {"prompt"} else {}
    kept = tuple(columns.keys() & {"label", "url"})
    options |= {"on_duplicate_id": "suffix", "keep_columns": kept}
    with monkeypatch.context() as patch:
        plain, others = list_both_ways(patch, path, **options)
    assert plain == others
    if "image" in columns and len(columns) > 1:
        prompt = " and ".join(f"{{{name}}}" for name in sorted(columns.keys() - {"image"}))
        plain, others = list_both_ways(monkeypatch, path, prompt=prompt, prompt_column="", image_column="image")
        assert plain == others


def test_plain_rows_take_the_short_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a row was made alone")

    monkeypatch.setattr("pipelines.sources.rows.ColumnRoles.make_row", refuse)
    (tmp_path / "rows.jsonl").write_bytes(make_lines(LINES["plain"], LINES["url"].replace(b"x", b"y", 1)))
    for name in ("bytes", "bytes and ids", "urls", "long texts", "null id", "null prompt"):
        write(tmp_path / f"{name}.parquet", COLUMNS[name])
    assert len(list_input(tmp_path / "rows.jsonl", prompt_column="prompt")) == 8
    write_lines(tmp_path / "asked.jsonl", *({"id": str(i), "image": f"{i}.jpg", "question": "q"} for i in range(3)))
    [row, *_] = list_input(tmp_path / "asked.jsonl", prompt="{{{{{id}}}}} {question}")
    assert row["prompt"] == "{{0}} q"
    names = ("float", "null score", "other nested field", "null prompt", "null id")
    lines = [LINES[name].replace(b'"x"', f'"{i}"'.encode(), 1) for i, name in enumerate(names)]
    (tmp_path / "more.jsonl").write_bytes(make_lines(*lines))
    assert len(list_input(tmp_path / "more.jsonl", prompt_column="prompt", keep_columns=("score",))) == 11
    for path in tmp_path.glob("*.parquet"):
        assert len(list_input(path)) == 5


def test_chunks_of_columns_are_cut_as_others() -> None:
    chunk = Chunk((), kept=pa.table({"a": [1, 2, 3]}), columns=pa.table({"id": [*"abc"]})).take(2)
    assert len(chunk) == 2 and chunk.kept is not None and len(chunk.kept) == 2


def test_hashes_depend_on_the_text_alone() -> None:
    texts = pa.array([f"{'x' * (i % 7)}{i}é" for i in range(20_000)])
    hashes = hash_texts(texts)
    assert len(np.unique(hashes)) == len(texts) and hashes.dtype == np.uint64
    assert (hash_texts(texts.slice(4000, 9000)) == hashes[4000:13_000]).all()
    assert (hash_texts(pa.chunked_array([texts.slice(0, 5), texts.slice(5)])) == hashes).all()
    few = hash_texts(pa.array(["", "a", "\0", "ab", "ba", "", "\0\0"]))
    assert len(np.unique(few)) == 6 and few[0] == few[5]
    assert len(hash_texts(pa.array([], pa.string()))) == 0


def test_hashes_of_places_tell_images_apart(tmp_path: Path) -> None:
    images = [["a.jpg", "b.jpg"], ["b.jpg", "a.jpg"], ["a.jpg"], [], ["a.jpgb.jpg"], ["a.jpg", "a.jpg"]]
    rows = list_input(write(tmp_path / "rows.parquet", {"images": images, "prompt": ["p"] * 6}), prompt_column="prompt")
    column = pa.chunked_array([pa.array([row["images"] for row in rows])])
    hashes = hash_places(column)
    assert len(np.unique(hashes)) == 6
    assert (hash_places(column.slice(1, 4)) == hashes[1:5]).all()
    assert len(np.unique(combine_hashes(hashes, hashes[::-1]))) == 6
