"""JSON lines become rows: paths, prompts, ids, kept columns and bad lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.errors import SourceError
from pipelines.media.fetch import Fetcher
from pipelines.media.reference import parse_reference
from pipelines.sources.jsonl import list_jsonl
from pipelines.sources.rows import ColumnRoles
from pipelines.storage.store import FileInfo
from tests.support.fetched import is_refused
from tests.support.jsonl_files import write_lines
from tests.support.rows import list_input


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_become_rows(tmp_path: Path, name: str) -> None:
    path = write_lines(
        tmp_path / name,
        {"image": "sub/1.jpg", "id": "one", "prompt": "Why?", "n": 1},
        {"uri": "s3://bucket/2.jpg", "n": None},
        {"image": ["/abs/3.jpg", "http://host/4.jpg", "5.jpg"], "id": 3, "n": 3},
    )
    one, two, three = list_input(path, keep_columns="n")
    assert (one["id"], one["uri"], one["prompt"]) == ("one", f"{tmp_path}/sub/1.jpg", "Why?")
    assert (two["id"], two["uri"], two["prompt"]) == (f"{path}#2", "s3://bucket/2.jpg", "Describe the image.")
    assert three["id"] == "3"
    assert [i["uri"] for i in three["images"]] == ["/abs/3.jpg", "http://host/4.jpg", f"{tmp_path}/5.jpg"]
    assert [row["kept"]["n"] for row in (one, two, three)] == [1, None, 3]


def test_bad_lines_are_error_rows_with_their_number(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"image": "1.jpg"},
        b"{broken",
        b"",
        b"[1, 2]",
        b'{"image": "\xff.jpg"}',
        b'{"image": "\\ud800.jpg"}',
        {"image": 5},
        {"image": ["ok.jpg", ""]},
        {"caption": "no image"},
        {"image": "x" * 5000},
        b"[" * 900,
        {"image": "last.jpg"},
    )
    chunks = list_jsonl(FileInfo(str(path), -1), ColumnRoles(), max_line_bytes=1000)
    first, *bad, last = [row for chunk in chunks for row in chunk.rows]
    assert not first.error and not last.error
    assert [row.error.split(":")[0] for row in bad] == [f"line {n}" for n in (2, 4, 5, 6, 7, 8, 9, 10, 11)]
    assert [row.id for row in bad] == [f"{path}#{n}" for n in (2, 4, 5, 6, 7, 8, 9, 10, 11)]
    assert "no prompt of its own" in bad[6].error and "longer than" in bad[7].error


def test_rows_without_images_are_text_only_and_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [row] = list_input(write_lines(tmp_path / "a.jsonl", {"prompt": "What is 2 + 2?"}))
    assert (row["images"], row["error"], row["prompt"]) == ([], "", "What is 2 + 2?")
    assert "1 row without an image" in caplog.text


def test_a_truncated_gz_ends_in_an_error_row_with_the_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", *({"image": f"{hash(str(i))}.jpg"} for i in range(2000)))
    path.write_bytes(path.read_bytes()[:-2000])
    *readable, damage = list_input(path)
    assert len(readable) > 100 and f"damaged after line {len(readable)}" in damage["error"]


def test_a_prompt_template_is_filled_from_each_line(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"image": "1", "what": "a cat", "prompt": "Mine {what}"},
        {"image": "2", "what": "a dog"},
        {"image": "3", "what": None},
    )
    mine, dog, none = list_input(path, prompt='Is it {what}? Say {{"yes"}}.', chain_of_thought=True)
    assert mine["prompt"].startswith("Mine {what}\n") and dog["prompt"].startswith('Is it a dog? Say {"yes"}.\n')
    assert "names the column 'what', which is null" in none["error"]
    with pytest.raises(SourceError, match=r"colour.*image, prompt, what"):
        list_input(path, prompt="Is it {colour}?")
    with pytest.raises(SourceError, match="no column what!r"):
        list_input(path, prompt="Is it {what!r}?")
    with pytest.raises(SourceError, match="single brace"):
        list_input(path, prompt="Is it {what}? }")


def test_named_columns_must_exist(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"pic": "1", "q": "Why?", "k": "a"})
    [row] = list_input(path, image_column="pic", prompt_column="q", id_column="k")
    assert (row["id"], row["uri"], row["prompt"]) == ("a", f"{tmp_path}/1", "Why?")
    for option in ("prompt_column", "id_column", "keep_columns"):
        with pytest.raises(SourceError, match="nowhere"):
            list_input(path, image_column="pic", **{option: "nowhere"})


def test_kept_columns_have_one_type_over_the_whole_input(tmp_path: Path) -> None:
    """Integers, floats and nulls are in separate files."""
    for name, value in (("1", 1), ("2", None), ("3", 2.5)):
        write_lines(tmp_path / f"{name}.jsonl", {"image": name, "n": value, "l": [name]})
    rows = list_input(tmp_path / "*.jsonl", keep_columns="n,l")
    assert [row["kept"] for row in rows] == [
        {"n": 1.0, "l": ["1"]},
        {"n": None, "l": ["2"]},
        {"n": 2.5, "l": ["3"]},
    ]
    write_lines(tmp_path / "4.jsonl", {"image": "4", "n": "text"})
    with pytest.raises(SourceError, match=r"changes its type at .*4\.jsonl#1 .*--keep-columns"):
        list_input(tmp_path / "*.jsonl", keep_columns="n")
    write_lines(tmp_path / "5.jsonl", {"image": "4", "n": "text"}, {"image": "5", "n": 5})
    with pytest.raises(SourceError, match=r"'n'.*5\.jsonl"):
        list_input(tmp_path / "5.jsonl", keep_columns="n")


def test_a_bad_uri_fails_only_its_row(tmp_path: Path) -> None:
    (tmp_path / "ok.jpg").write_bytes(b"ok")
    os.mkfifo(tmp_path / "pipe")
    uris = ["a\0b", "nosuch://x/y", "http://[bad", "", "pipe", ".", "n" * 5000, "s3://", "ok.jpg"]
    rows = list_input(write_lines(tmp_path / "a.jsonl", *({"image": [uri]} for uri in uris)))
    fetcher = Fetcher()
    futures = [fetcher.submit([parse_reference(image) for image in row["images"]]) for row in rows]
    assert [bool(row["error"]) for row in rows] == [not uri for uri in uris]
    assert futures[-1].result() == [b"ok"]
    assert all(is_refused(f) for f, uri in zip(futures[:-1], uris[:-1], strict=True) if uri)
