"""Rows become the examples that the model learns: pictures by dialogue, captions with and without a chat, videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovis_model.inputs.processor import Processor
from ovis_model.training.examples import IGNORED_LABEL, TrainingExample
from pipelines.media.reference import FileRef
from pipelines.training.data.forms import Dialogue, TextTurn
from pipelines.training.run import make_prepare_options
from tests.support.training_files import TINY, make_train_config, write_pictures
from tests.support.videos import draw_number, write_video

ANSWER = TextTurn("assistant", "Red.")


def prepare(tmp_path: Path, row: Dialogue, **options: Any) -> TrainingExample:
    preparer = make_prepare_options(make_train_config("d", tmp_path, **options)).make_preparer()
    [(example, error)] = preparer.prepare([row])
    assert isinstance(example, TrainingExample), error
    return example


def ask(text: str, uri: str, **fields: Any) -> Dialogue:
    return Dialogue((TextTurn("user", text), ANSWER), (FileRef(uri),), **fields)


def get_learnt(example: TrainingExample) -> list[int]:
    return [int(i) for i in example.labels if i != IGNORED_LABEL]


def test_answers_and_their_ends_are_learnt_and_prompts_are_those_of_inference(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    example = prepare(tmp_path, ask("Colour?", f"{tmp_path}/1.png"))
    processor = Processor.from_pretrained(str(TINY))
    assert get_learnt(example) == processor.encode_answer("Red.")
    request = processor.build_request("Colour?", [Image.open(tmp_path / "1.png")], 2)
    assert np.array_equal(example.input_ids, [*request.input_ids, *get_learnt(example)])
    assert np.array_equal(example.tiles, request.tiles)


def test_a_plain_caption_has_neither_chat_nor_end(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    row = ask("<image>\nDescription:\n\n", f"{tmp_path}/1.png", is_caption=True)
    plain = prepare(tmp_path, row)
    assert get_learnt(plain) == Processor.from_pretrained(str(TINY)).encode_answer("Red.")[:-1]


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_a_row_may_have_its_own_number_of_tiles(tmp_path: Path, max_tiles: int) -> None:
    write_pictures(tmp_path)
    example = prepare(tmp_path, ask("?", f"{tmp_path}/2.png", max_tiles=max_tiles), max_tiles=9)
    assert len(example.tiles) == (1 if max_tiles == 1 else 3)


def test_a_video_is_as_many_images_as_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [draw_number(number) for number in range(12)])
    example = prepare(tmp_path, ask("<video>\n?", f"{tmp_path}/a.mp4", kind="video"), num_frames=3, max_tiles=None)
    assert len(example.tiles) == 3
