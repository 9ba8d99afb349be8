"""Conversations as rows: the first turn of the user is the prompt, and its images are the row's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.sources.conversations import strip_marks
from tests.support.jsonl_files import write_lines
from tests.support.rows import list_input

TEXT = {"type": "text", "text": "What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


FORMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "OpenAI": ({"messages": [user(TEXT, {"type": "image_url", "image_url": {"url": "http://h/1"}})]}, ["http://h/1"]),
    "OpenAI, text as URL": ({"messages": [user({"type": "image_url", "image_url": "1.png"}, TEXT)]}, ["1.png"]),
    "OpenAI, responses": (
        {"input": [user({"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": "1.png"})]},
        ["1.png"],
    ),
    "OpenAI, batch": (
        {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions"}
        | {"body": {"messages": [user(TEXT, {"type": "image_url", "image_url": {"url": "1.png"}})]}},
        ["1.png"],
    ),
    "Qwen": (
        {"messages": [user({"type": "image", "image": "1.png"}, {"type": "video", "video": "2.mp4"}, TEXT)]},
        ["1.png", "2.mp4"],
    ),
    "Hugging Face": ({"messages": [user({"type": "image"}, TEXT)], "images": [{"path": "1.png"}]}, ["1.png"]),
    "ms-swift": (
        {"messages": [{"role": "user", "content": "<image><image>What is it?"}, ANSWER], "images": ["1.png", "2.png"]},
        ["1.png", "2.png"],
    ),
    "LLaVA": (
        {
            "image": "1.png",
            "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A"}],
        },
        ["1.png"],
    ),
    "LLaVA, video": (
        {"video": "1.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat is it?"}]},
        ["1.mp4"],
    ),
    "TRL": ({"prompt": [{"role": "user", "content": "What is it?"}], "image": "1.png"}, ["1.png"]),
    "without images": ({"messages": [{"role": "user", "content": "What is it?"}]}, []),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_first_turn_of_the_user_is_the_prompt(tmp_path: Path, form: str) -> None:
    values, images = FORMS[form]
    [row] = list_input(write_lines(tmp_path / "a.jsonl", values))
    assert (row["prompt"], row["has_own_prompt"], row["error"]) == ("What is it?", True, "")
    found = [image["uri"].removeprefix(f"{tmp_path}/") for image in row["images"]]
    assert found == images
    assert row["id"] == values.get("custom_id", f"{tmp_path}/a.jsonl#1")


def test_an_own_prompt_and_a_given_column_come_first(tmp_path: Path) -> None:
    values = {"image": "1", "prompt": "Mine?", "q": "", "messages": [{"role": "user", "content": "Theirs?"}]}
    path = write_lines(tmp_path / "a.jsonl", values)
    assert [
        list_input(path, **options)[0]["prompt"]
        for options in ({}, {"prompt_column": "q"}, {"prompt_column": "messages"})
    ] == [
        "Mine?",
        "Describe the image.",
        "Theirs?",
    ]


def test_what_is_not_used_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    system = {"role": "system", "content": "Be kind."}
    first, second = {"role": "user", "content": "<image>Why?"}, {"role": "user", "content": "And?"}
    lines = [
        {"messages": [system, first, ANSWER, second], "images": ["1"]},
        {"messages": [first], "images": ["1", "2"]},
        {"messages": [first], "images": ["1"]},
        {"messages": [system], "images": ["1"]},
    ]
    rows = list_input(write_lines(tmp_path / "a.jsonl", *lines))
    assert [(row["prompt"], len(row["images"])) for row in rows] == [
        ("Why?", 1),
        ("Why?", 2),
        ("Why?", 1),
        ("Describe the image.", 1),
    ]
    assert "2 rows with turns that are not used" in caplog.text
    assert "1 row with another number of images" in caplog.text


def test_a_row_whose_images_are_missing_is_an_error_row(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "<image>Why?"}]},
        {"messages": [user({"type": "image"}, TEXT)]},
        {"messages": [user(TEXT), ANSWER, user({"type": "image_url", "image_url": {"url": "data:,x"}})]},
    ]
    rows = list_input(write_lines(tmp_path / "a.jsonl", *lines))
    assert ["marks 1 image," in row["error"] for row in rows] == [True, True, False]
    assert "only a later turn" in rows[2]["error"]


def test_objects_that_only_resemble_conversations_are_rows(tmp_path: Path) -> None:
    odd: list[Any] = [
        5,
        [],
        [5],
        [{}],
        "text",
        {"role": "user"},
        [{"role": 3, "content": 4}],
        [{"role": "user", "content": {"a": 1}}],
    ]
    lines = [{"image": "1", "messages": value, "conversations": value, "body": value} for value in odd]
    rows = list_input(write_lines(tmp_path / "a.jsonl", *lines))
    assert [row["error"] for row in rows] == [""] * len(odd)


def test_removing_marks_leaves_none() -> None:
    assert strip_marks("<image>\n<image>\nWhy?\n<image>") == ("Why?", 3)
    assert "<image>" not in strip_marks("<im<image>age>")[0]
    assert strip_marks(" as it is ") == (" as it is ", 0)
