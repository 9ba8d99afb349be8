"""Build training examples from dialogues, captions and preference pairs. Knows numpy, not torch.

Ids are made by the code that makes the prompts of inference, so that training and inference see the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ovis_model.config import OvisConfig
from ovis_model.inputs.prompt import (
    DEFAULT_SYSTEM_PROMPT,
    IMAGE_MARK,
    ChatTokenizer,
    Turn,
    build_image_query,
    expand_atoms,
)
from ovis_model.types import IMAGE_ATOM_ID, Grid

IGNORED_LABEL = -100
"""The label of positions that teach nothing."""


class ExampleError(ValueError):
    """Nothing can be learnt from this row."""


class ExampleTooLongError(ExampleError):
    """The row has `length` tokens, more than `max_length`. It is refused, because its end is what it teaches."""

    def __init__(self, length: int, max_length: int) -> None:
        super().__init__(
            f"the example has {length} tokens, more than max_length={max_length}; use fewer tiles or frames, or a "
            "larger max_length"
        )
        self.length, self.max_length = length, max_length


@dataclass(frozen=True, eq=False)
class TiledImages:
    """The images of an example.

    tiles: uint8[N, 3, S, S] and sizes: int32[N, 2], as `inputs.tiling.tile_images` makes them; grids: one per image.
    """

    tiles: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    grids: tuple[Grid, ...]


@dataclass(frozen=True, eq=False)
class TrainingExample:
    """One sequence with its labels.

    input_ids: int32[L], as in `types.Request`: placeholders are expanded.
    labels: int32[L]; the id at the positions that are learnt, else IGNORED_LABEL. Position i is predicted from the
        positions before it.
    tiles: uint8[N, 3, S, S], tile_sizes: int32[N, 2]; N may be 0. Examples of a batch with the same `tiles` object are
        encoded together: their images once, and the beginning that they share once.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    tiles: NDArray[np.uint8]
    tile_sizes: NDArray[np.int32]

    @property
    def num_targets(self) -> int:
        """The number of ids that are learnt."""
        return int((self.labels[1:] != IGNORED_LABEL).sum())


def render_example(example: TrainingExample, tokenizer: Tokenizer) -> str:
    """Return the text of an example for a reader: `<image xN>` for N visual tokens, and what is learnt in `[[ ]]`."""
    is_learnt = example.labels != IGNORED_LABEL
    kinds = [(bool(learnt), int(i < 0)) for learnt, i in zip(is_learnt, example.input_ids, strict=True)]
    parts, start = [], 0
    for (learnt, is_visual), run in groupby(kinds):
        ids = example.input_ids[start : start + len(list(run))]
        start += len(ids)
        text = (
            f"<image x{(ids == IMAGE_ATOM_ID).sum()}>"
            if is_visual
            else tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        )
        parts.append(f"[[{text}]]" if learnt else text)
    return "".join(parts)


@dataclass(frozen=True, eq=False)
class PreferenceExample:
    """Two answers to one prompt, each with the end of its turn: int32[P], int32[C], int32[R], and the images."""

    prompt_ids: NDArray[np.int32]
    chosen_ids: NDArray[np.int32]
    rejected_ids: NDArray[np.int32]
    tiles: NDArray[np.uint8]
    tile_sizes: NDArray[np.int32]

    def split(self) -> tuple[TrainingExample, TrainingExample]:
        """Return the chosen and the rejected dialogue, which share their tiles."""
        chosen, rejected = map(self._make_example, (self.chosen_ids, self.rejected_ids))
        return chosen, rejected

    def _make_example(self, answer: NDArray[np.int32]) -> TrainingExample:
        ids = np.concatenate([self.prompt_ids, answer])
        labels = np.concatenate([np.full_like(self.prompt_ids, IGNORED_LABEL), answer])
        return TrainingExample(ids, labels, self.tiles, self.tile_sizes)


class ExampleBuilder:
    """The builder of examples for one checkpoint; `max_length` is in tokens, by default the checkpoint's.

    Each method raises ExampleError with the reason if a row teaches nothing, ExampleTooLongError if it is too long, and
    ValueError if its marks do not fit its images or a text is not Unicode.
    """

    def __init__(self, config: OvisConfig, tokenizer: Tokenizer, max_length: int | None = None) -> None:
        self._vision, self._chat = config.vision, ChatTokenizer(tokenizer)
        self._max_length = config.max_length if max_length is None else max_length

    def build_dialogue(self, turns: Sequence[Turn], images: TiledImages | None = None) -> TrainingExample:
        """Build an example that teaches every answer of a dialogue.

        `turns` begin with a system prompt or get the default one; then users and assistants alternate. The texts of
        users contain one `<image>` mark per image, or none: then the images come first.
        """
        images = images or self._make_no_images()
        _check_turns(turns, last="assistant")
        ids, is_learnt = self._chat.encode_dialogue(_complete(turns, len(images.grids)), images.grids)
        return self._make_example(ids, is_learnt, images)

    def build_caption(self, template: str, caption: str, images: TiledImages) -> TrainingExample:
        """Build an example that teaches a caption after `template`, which has one mark per image.

        No end is learnt, as in the original: a model that learns only such captions never stops.
        """
        if not caption.strip():
            raise ExampleError("the caption is empty; remove the row")
        return self._make_example(*self._chat.encode_caption(template, caption, images.grids), images)

    def build_preference(
        self, turns: Sequence[Turn], chosen: str, rejected: str, images: TiledImages | None = None
    ) -> PreferenceExample:
        """Build a pair of answers to `turns`, which end with a user's."""
        images = images or self._make_no_images()
        _check_turns(turns, last="user")
        _check_pair(chosen, rejected)
        prompt = [*_complete(turns, len(images.grids)), ("assistant", None)]
        ids = self._expand(self._chat.encode_dialogue(prompt, images.grids)[0])
        chosen_ids, rejected_ids = (np.array(self._chat.encode_answer(text), np.int32) for text in (chosen, rejected))
        self._check_length(len(ids) + max(len(chosen_ids), len(rejected_ids)))
        return PreferenceExample(ids, chosen_ids, rejected_ids, images.tiles, images.sizes)

    def _make_example(self, ids: Sequence[int], is_learnt: Sequence[bool], images: TiledImages) -> TrainingExample:
        labels = [i if learnt else IGNORED_LABEL for i, learnt in zip(ids, is_learnt, strict=True)]
        repeats = np.where(np.array(ids) == IMAGE_ATOM_ID, self._vision.tokens_per_tile, 1)
        self._check_length(int(repeats.sum()))
        expanded = np.repeat(np.array(labels, np.int32), repeats)
        return TrainingExample(self._expand(ids), expanded, images.tiles, images.sizes)

    def _expand(self, ids: Sequence[int]) -> NDArray[np.int32]:
        return expand_atoms(ids, self._vision.tokens_per_tile)

    def _check_length(self, length: int) -> None:
        if length > self._max_length:
            raise ExampleTooLongError(length, self._max_length)

    def _make_no_images(self) -> TiledImages:
        side = self._vision.image_size
        return TiledImages(np.zeros((0, 3, side, side), np.uint8), np.zeros((0, 2), np.int32), ())


_ROLES = ("user", "assistant")


def _check_turns(turns: Sequence[Turn], *, last: str) -> None:
    """Raise ExampleError unless users and assistants alternate after an optional system prompt, and `last` ends."""
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise ExampleError("the dialogue has no turns of a user and an assistant; remove the row")
    wanted = [_ROLES[i % 2] for i in range(len(spoken))]
    if spoken != wanted or spoken[-1] != last:
        raise ExampleError(
            f"the roles of the dialogue are {', '.join(roles)}; after an optional system prompt, user and assistant "
            f"must alternate, and the last turn must be the {last}'s"
        )
    for number, (role, text) in enumerate(turns, start=1):
        if role == "assistant":
            _check_answer(text or "", f"the answer in turn {number}")


def _check_pair(chosen: str, rejected: str) -> None:
    _check_answer(chosen, "the chosen answer")
    _check_answer(rejected, "the rejected answer")
    if chosen == rejected:
        raise ExampleError("the chosen and the rejected answer are equal, so the pair teaches nothing; remove the row")


def _check_answer(text: str, name: str) -> None:
    if not text.strip():
        raise ExampleError(f"{name} is empty; remove the row")
    if IMAGE_MARK in text:
        raise ExampleError(f"{name} contains {IMAGE_MARK}, but only users show images; move or remove the mark")


def _complete(turns: Sequence[Turn], num_images: int) -> list[Turn]:
    """Add the default system prompt and the marks of the images where the dialogue has none."""
    complete = [*turns] if turns[0][0] == "system" else [("system", DEFAULT_SYSTEM_PROMPT), *turns]
    if not any(role == "user" and IMAGE_MARK in (text or "") for role, text in turns):
        complete[1] = ("user", build_image_query(complete[1][1] or "", num_images))
    return complete
