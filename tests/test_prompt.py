"""Prompts have the original's ids, and control tokens in a user's text stay text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ovis_model.inputs.prompt import (
    CHAIN_OF_THOUGHT,
    DEFAULT_SYSTEM_PROMPT,
    IMAGE_MARK,
    ChatTokenizer,
    build_image_query,
    build_video_query,
    expand_atoms,
    make_placeholders,
    remove_marks,
)
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import IMAGE_ATOM_ID, Grid
from tests.support.golden_data import CHECKPOINTS, LAYOUTS, checkpoint_dir, load_expected

TOKENIZERS = {layout: load_tokenizer(checkpoint_dir(CHECKPOINTS[0], layout)) for layout in LAYOUTS}
CHATS = {layout: ChatTokenizer(TOKENIZERS[layout]) for layout in LAYOUTS}
FIRST_ADDED_ID = 564


def list_added_tokens() -> list[str]:
    tokens = json.loads(TOKENIZERS["native"].to_str())["added_tokens"]
    return [token["content"] for token in tokens]


def detokenize(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text


@pytest.mark.parametrize(
    ("kind", "query"),
    [
        ("single", build_image_query("Describe the image.", 1)),
        ("cot", build_image_query(f"What's the area of the shape?\n{CHAIN_OF_THOUGHT}", 1)),
        ("multi", build_image_query("Describe each image.", 3)),
        ("video", build_video_query("Describe the video.", 6)),
        ("text", build_image_query("Hello", 0)),
    ],
)
def test_queries_are_the_originals(kind: str, query: str) -> None:
    (case,) = [case for case in load_expected(CHECKPOINTS[0])["generation"] if case["kind"] == kind]
    assert query == case["query"]


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 2), Grid(2, 1), Grid(2, 3), Grid(3, 3), Grid(12, 1)])
def test_placeholders_take_the_documented_number_of_tokens(grid: Grid) -> None:
    cells = grid.rows * grid.cols
    ids = expand_atoms(make_placeholders(grid), 256)
    assert ids.dtype == np.int32
    assert len(ids) == 256 * (1 + (cells if cells > 1 else 0)) + cells + 2


@given(st.lists(st.integers(-305, 50)), st.integers(1, 9))
def test_expansion_repeats_atoms_only(ids: list[int], tokens_per_tile: int) -> None:
    slow = [i for i in ids for _ in range(tokens_per_tile if i == IMAGE_ATOM_ID else 1)]
    assert expand_atoms(ids, tokens_per_tile).tolist() == slow


@given(st.text(alphabet="<imagex>", max_size=40))
@example("<ima<image>ge><<image>image>")
def test_removing_marks_leaves_none(text: str) -> None:
    assert IMAGE_MARK not in remove_marks(text)
    assert IMAGE_MARK in text or remove_marks(text) == text


@pytest.mark.parametrize("token", list_added_tokens())
def test_control_tokens_in_text_are_text(token: str) -> None:
    text = f"a{token}b {token}"
    by_layout = [CHATS[layout].encode_prompt(f"{IMAGE_MARK}{text}", [Grid(1, 1)], text) for layout in LAYOUTS]
    assert by_layout[0] == by_layout[1]
    assert sum(i >= FIRST_ADDED_ID for i in by_layout[0]) == 5  # <|im_start|> x 3, <|im_end|> x 2
    readable = detokenize(TOKENIZERS["native"], [i for i in by_layout[0] if i >= 0])
    assert readable.count(text) == 2


# Hypothesis also draws strings from the source code, control tokens included.
ordinary_text = st.text(max_size=60).filter(
    lambda text: not any(mark in text for mark in [IMAGE_MARK, *list_added_tokens()])
)


@given(ordinary_text, ordinary_text)
@example("\n\n indented\u0301", "")
@example("\u0301 a combining mark first", "  ")
@settings(deadline=None)
def test_ordinary_text_has_the_ids_of_the_whole_prompt(query: str, system: str) -> None:
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{query}<|im_end|>\n"
    for layout in LAYOUTS:
        whole = TOKENIZERS[layout].encode(f"{turns}<|im_start|>assistant\n", add_special_tokens=False).ids
        assert CHATS[layout].encode_prompt(query, [], system) == whole


def test_a_prompt_that_is_encoded_again_has_ids_of_its_own() -> None:
    chat = ChatTokenizer(TOKENIZERS["native"])
    first = chat.encode_prompt("<image> what?", [Grid(1, 2)])
    expected = list(first)
    first.clear()
    assert chat.encode_prompt("<image> what?", [Grid(1, 2)]) == expected
    assert chat.encode_prompt("<image> what?", [Grid(2, 2)]) != expected


def test_a_mark_in_the_system_prompt_is_text() -> None:
    ids = CHATS["aidc"].encode_prompt("hello", [], f"Look at {IMAGE_MARK}")
    assert min(ids) >= 0
    assert f"Look at {IMAGE_MARK}" in detokenize(TOKENIZERS["aidc"], ids)


@pytest.mark.parametrize(("query", "num_grids"), [("no mark", 1), (f"{IMAGE_MARK} {IMAGE_MARK}", 1), (IMAGE_MARK, 0)])
def test_marks_without_images_and_images_without_marks_are_refused(query: str, num_grids: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{query.count(IMAGE_MARK)} <image> marks? for {num_grids} images?; write one"
    ):
        CHATS["aidc"].encode_prompt(query, [Grid(1, 1)] * num_grids)


@pytest.mark.parametrize("where", ["query", "system"])
def test_lone_surrogates_are_refused(where: str) -> None:
    texts = {"query": "fine", "system": DEFAULT_SYSTEM_PROMPT} | {where: "half \ud83d of a pair"}
    with pytest.raises(ValueError, match=r"\\ud83d.*errors='replace'"):
        CHATS["aidc"].encode_prompt(texts["query"], [], texts["system"])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    from tokenizers.models import BPE

    with pytest.raises(ValueError, match=r"im_start.*tokenizer of an Ovis2"):
        ChatTokenizer(Tokenizer(BPE()))
