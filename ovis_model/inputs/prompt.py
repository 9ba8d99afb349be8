"""Encode a question about images as token ids of Ovis2's chat format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ovis_model.types import (
    COLUMN_SEPARATOR_ID,
    IMAGE_ATOM_ID,
    IMAGE_END_ID,
    IMAGE_START_ID,
    OVERVIEW_END_ID,
    ROW_SEPARATOR_ID,
    Grid,
)
from ovis_model.wording import count_nouns

Turn = tuple[str, str | None]
"""A role ("system", "user" or "assistant") and its text."""

IMAGE_MARK = "<image>"
_MAX_CACHED_TEXTS = 64
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
CHAIN_OF_THOUGHT = (
    "Provide a step-by-step solution to the problem, and conclude with 'the answer is' followed by the final solution."
)
"""A request for reasoning, to append to a question on a separate line (the model card's wording)."""


def build_image_query(text: str, num_images: int) -> str:
    """Put the marks of `num_images` images before `text`; several images are numbered (model card)."""
    if num_images == 0:
        return text
    if num_images == 1:
        return f"{IMAGE_MARK}\n{text}"
    return "".join(f"Image {i}: {IMAGE_MARK}\n" for i in range(1, num_images + 1)) + text


def build_video_query(text: str, num_frames: int) -> str:
    """Put the marks of the `num_frames` frames of a video before `text`."""
    return f"{IMAGE_MARK}\n" * num_frames + text


def remove_marks(text: str) -> str:
    """Remove every `<image>` from `text`, so that no part of it is replaced by an image."""
    while IMAGE_MARK in text:  # removing a mark can join the halves of another
        text = text.replace(IMAGE_MARK, "")
    return text


def make_placeholders(grid: Grid) -> list[int]:
    """Return the placeholders of one image, one atom per tile: the overview, then the other tiles and separators."""
    ids = [IMAGE_START_ID, IMAGE_ATOM_ID, OVERVIEW_END_ID]
    if grid != (1, 1):
        row = [IMAGE_ATOM_ID, *[COLUMN_SEPARATOR_ID, IMAGE_ATOM_ID] * (grid.cols - 1)]
        ids += [*row, *[ROW_SEPARATOR_ID, *row] * (grid.rows - 1)]
    return [*ids, IMAGE_END_ID]


def expand_atoms(ids: Sequence[int], tokens_per_tile: int) -> NDArray[np.int32]:
    """Repeat each atom of `ids` once per visual token of its tile; return int32[T]."""
    compact = np.array(ids, np.int32)
    return np.repeat(compact, np.where(compact == IMAGE_ATOM_ID, tokens_per_tile, 1))


class ChatTokenizer:
    """An encoder of chat prompts that always encodes text as text, never as control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if `tokenizer` lacks Qwen's `<|im_start|>` or `<|im_end|>`."""
        self._start = _find_control_id(tokenizer, "<|im_start|>")
        self._end = _find_control_id(tokenizer, "<|im_end|>")
        self._text = _make_text_tokenizer(tokenizer)
        # Most rows share their prompt, and all share the parts around it.
        self._encode = lru_cache(_MAX_CACHED_TEXTS)(self._encode_text)

    def encode_prompt(self, query: str, grids: Sequence[Grid], system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> list[int]:
        """Encode a prompt whose `<image>` marks become images cut by `grids`, with one atom per tile.

        A mark in `system_prompt` is plain text. Raise ValueError if the numbers of marks and grids differ, or if a text
        is not Unicode.
        """
        system = [self._start, *self._encode(f"system\n{system_prompt}"), self._end, *self._encode("\n")]
        user = [self._start, *self._encode_query(f"user\n{query}", grids), self._end, *self._encode("\n")]
        return [*system, *user, self._start, *self._encode("assistant\n")]

    def encode_answer(self, text: str) -> list[int]:
        """Encode the answer `text` to a prompt, including the end of the turn."""
        return [*self._encode(text), self._end]

    def encode_dialogue(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> tuple[list[int], list[bool]]:
        """Encode turns; return their ids, one atom per tile, and which ids a model learns: answers with their ends.

        A dialogue without its last answer is a prompt, and equals that of `encode_prompt`, if "assistant" with the text
        None ends it. Marks in the turns of users become images. Raise ValueError as `encode_prompt` does.
        """
        marks = [text.count(IMAGE_MARK) if role == "user" and text else 0 for role, text in turns]
        check_num_marks(sum(marks), len(grids))
        ids: list[int] = []
        is_learnt: list[bool] = []
        for (role, text), at, count in zip(turns, accumulate(marks, initial=0), marks, strict=False):
            head, body = self._encode_turn(role, text, grids[at : at + count])
            between = self._encode("\n") if ids else []
            ids += [*between, *head, *body]
            is_learnt += [False] * (len(between) + len(head)) + [role == "assistant"] * len(body)
        return ids, is_learnt

    def encode_caption(self, template: str, caption: str, grids: Sequence[Grid]) -> tuple[list[int], list[bool]]:
        """Encode a caption after a `template` with one mark per image, without roles and without an end.

        Return ids and which of them a model learns, as `encode_dialogue` does.
        """
        head, body = self._encode_query(template, grids), self._encode(caption)
        return [*head, *body], [False] * len(head) + [True] * len(body)

    def _encode_turn(self, role: str, text: str | None, grids: Sequence[Grid]) -> tuple[list[int], list[int]]:
        """Encode what opens a turn, and the rest, which a model learns if it is an answer."""
        if role == "assistant":
            return [self._start, *self._encode("assistant\n")], [] if text is None else self.encode_answer(text)
        query = f"{role}\n{text}"
        return [self._start], [
            *(self._encode_query(query, grids) if role == "user" else self._encode(query)),
            self._end,
        ]

    def _encode_query(self, query: str, grids: Sequence[Grid]) -> list[int]:
        first, *others = query.split(IMAGE_MARK)
        check_num_marks(len(others), len(grids))
        ids = [*self._encode(first)]
        for grid, text in zip(grids, others, strict=True):
            ids += [*make_placeholders(grid), *self._encode(text)]
        return ids

    def _encode_text(self, text: str) -> tuple[int, ...]:
        if surrogate := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"the text contains {surrogate[0]!r}, half of a surrogate pair, which is not a character; "
                "decode the text with errors='replace'"
            )
        return tuple(self._text.encode(text, add_special_tokens=False).ids)


def check_num_marks(num_marks: int, num_images: int) -> None:
    """Raise ValueError unless there is one mark per image."""
    if num_marks != num_images:
        raise ValueError(
            f"the text contains {count_nouns(num_marks, f'{IMAGE_MARK} mark')} for {count_nouns(num_images, 'image')}; "
            "write one mark per image, or none to put the images first (prompt.remove_marks)"
        )


def _find_control_id(tokenizer: Tokenizer, token: str) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer lacks {token}; use the tokenizer of an Ovis2 checkpoint")
    return token_id


def _make_text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Copy `tokenizer` without its added tokens.

    `encode_special_tokens` is not enough: it keeps added tokens that are not flagged special, such as `<tool_call>`.
    """
    text = Tokenizer(tokenizer.model)  # shares the vocabulary
    text.normalizer = tokenizer.normalizer
    text.pre_tokenizer = tokenizer.pre_tokenizer
    return text
