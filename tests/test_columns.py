"""Options that name columns apply to every kind of input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jobs import caption
from jobs.command_line import parse_command_line
from pipelines.errors import SourceError
from tests.support.jsonl_files import write_lines
from tests.support.parquet_files import write
from tests.support.rows import list_input, make_config
from tests.support.tars import write_tar


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Write three rows each of files, tar, Parquet and JSON lines; all but the files have a column n."""
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    members = [(f"{i}.{end}", json.dumps({"n": i}).encode()) for i in range(3) for end in ("jpg", "json")]
    write_tar(tmp_path / "a.tar", members)
    write(tmp_path / "b.parquet", {"image": [b""] * 3, "n": [3, 4, 5]})
    write_lines(tmp_path / "c.jsonl", *({"image": f"{i}.png", "n": i} for i in (6, 7, 8)))
    return [tmp_path / "*.png", tmp_path / "a.tar", tmp_path / "b.parquet", tmp_path / "c.jsonl"]


def test_keep_columns_is_parsed_and_part_of_the_fingerprint() -> None:
    config = parse_command_line(caption.COMMAND, ["in", "out", "--model", "demo", "--keep-columns", "a,b c"], "")
    assert config.keep_columns == ("a", "b c") == make_config("in", keep_columns=["a", "b c"]).keep_columns
    assert config.fingerprint_fields()["keep_columns"] == ["a", "b c"]
    assert config.fingerprint_fields() != config.model_copy(update={"id_column": "x"}).fingerprint_fields()


@pytest.mark.parametrize(("names", "message"), [("a,text", "already has text; rename"), ("a,a", "twice")])
def test_kept_columns_that_clash_are_refused(names: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_command_line(caption.COMMAND, ["in", "out", "--model", "demo", "--keep-columns", names], "")
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("limit", [None, 1, 3, 5, 7, 11])
def test_the_limit_counts_over_all_inputs(inputs: list[Path], limit: int | None) -> None:
    everything = list_input(*inputs, keep_columns="n")
    assert [row["kept"]["n"] for row in everything] == [None] * 3 + list(range(9))
    assert len({row["id"] for row in everything}) == 12
    if limit != 1:  # one file alone is an input without columns
        assert [row["id"] for row in list_input(*inputs, limit=limit)] == [row["id"] for row in everything[:limit]]


def test_braces_in_a_prompt_are_text_for_inputs_without_columns(
    inputs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = 'Answer as {"n": number} }'
    write_tar(tmp_path / "bare.tar", [("1.jpg", b"")])
    assert {row["prompt"] for row in list_input(inputs[0], tmp_path / "bare.tar", prompt=prompt)} == {prompt}
    assert 'no columns, so the prompt\'s {"n": number} is sent as it is' in caplog.text
    with pytest.raises(SourceError, match="no column n; its columns: none"):
        list_input(inputs[0], keep_columns="n")


def test_a_prompt_is_filled_from_columns_that_every_input_has(inputs: list[Path]) -> None:
    rows = list_input(*inputs[1:], prompt="Is it {n}?")
    assert [row["prompt"] for row in rows] == [f"Is it {n}?" for n in range(9)]
    with pytest.raises(SourceError, match=r"names columns, but 3 rows come from inputs without columns"):
        list_input(*inputs, prompt="Is it {n}?")
    for shard in inputs[1:]:
        with pytest.raises(SourceError, match=r"(?s)no column colour.*\{\{ and \}\}"):
            list_input(shard, prompt="Is it {colour}?")


@pytest.mark.parametrize("at", [1, 3])
def test_an_image_column_that_does_not_exist_is_refused(inputs: list[Path], at: int) -> None:
    with pytest.raises(SourceError, match="no column nowhere"):
        list_input(inputs[at], image_column="nowhere")


def test_shards_must_be_regular_files_with_utf8_names(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text("{}")
    for pattern in ("*.tar", "*.jsonl"):
        with pytest.raises(SourceError, match="not a regular file with a UTF-8 name"):
            list_input(tmp_path / pattern)


def test_a_damaged_shard_is_an_error_row_whatever_the_columns(inputs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(b"damaged")
    write_lines(tmp_path / "d.jsonl", b"{")
    rows = list_input(*inputs[1:], tmp_path / "b.tar", tmp_path / "d.jsonl", prompt="Is it {n}?")
    assert [bool(row["error"]) for row in rows] == [False] * 9 + [True] * 2
