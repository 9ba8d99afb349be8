"""Examples have the ids of inference, teach answers and nothing else, and are refused rather than cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ovis_model.inputs.processor import Processor
from ovis_model.inputs.tiling import choose_grid, tile_images
from ovis_model.tokenizer import load_tokenizer
from ovis_model.training.examples import ExampleError, ExampleTooLongError, TiledImages, TrainingExample, render_example
from tests.support.golden_data import draw_picture
from tests.support.training import TINY, draw_images, load_training_model, make_batch, make_builder, make_examples

END = 566


def decode_learnt(example: TrainingExample) -> str:
    learnt = example.labels[example.labels != -100]
    return Processor.from_pretrained(TINY).detokenize(learnt)


def test_a_prompt_equals_that_of_inference() -> None:
    """Real pictures, cut by the processor, with the same text before the answer."""
    processor, side = Processor.from_pretrained(TINY), 56
    pictures = [draw_picture({"seed": seed, "width": 100, "height": 70, "mode": "RGB"}) for seed in range(2)]
    grids = tuple(choose_grid(*picture.size, 4, side) for picture in pictures)
    images = TiledImages(*tile_images(pictures, 4, side), grids)
    for text in ("Compare them.", "First <image>, then <image>: compare."):
        request = processor.build_request(text, pictures, max_tiles=4)
        example = make_builder().build_dialogue([("user", text), ("assistant", "Both are noise.")], images)
        answer = processor.encode_answer("Both are noise.")
        assert example.input_ids.tolist() == [*request.input_ids.tolist(), *answer]
        assert example.labels.tolist() == [-100] * len(request.input_ids) + answer
        assert np.array_equal(example.tiles, request.tiles) and np.array_equal(example.tile_sizes, request.tile_sizes)
        pair = make_builder().build_preference([("user", text)], "Both are noise.", "One is a cat.", images)
        assert np.array_equal(pair.prompt_ids, request.input_ids)
        assert np.array_equal(pair.split()[0].labels, example.labels)


def test_every_answer_of_a_dialogue_is_learnt_with_its_end() -> None:
    turns = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No!")]
    example = make_builder().build_dialogue(turns)
    assert decode_learnt(example) == "Yes.No!"
    assert (example.labels == END).sum() == 2 and example.labels[-1] == END
    assert example.num_targets == (example.labels != -100).sum()
    # The line end after the first answer's end is not learnt.
    after = int(np.flatnonzero(example.labels == END)[0]) + 1
    assert example.labels[after] == -100


def test_a_caption_is_learnt_without_an_end() -> None:
    example = make_builder().build_caption("<image>\nDescription:\n\n", "A red ball.", draw_images(0, (1, 2)))
    assert decode_learnt(example) == "A red ball."
    assert END not in example.input_ids


def test_only_answers_teach() -> None:
    """The loss changes with an answer's label, and with nothing that is ignored."""
    model, example = load_training_model(), make_examples()[2]

    def measure(changed: TrainingExample) -> float:
        return float(model.loss_sum(make_batch(model, [changed]))[0].detach())

    loss, learnt = measure(example), np.flatnonzero(example.labels != -100)
    for at in learnt:
        labels = example.labels.copy()
        labels[at] = (labels[at] + 1) % 500
        assert measure(replace(example, labels=labels)) != loss
    # Ids after the last answer are as padding: no learnt id sees them.
    padded = replace(
        example,
        input_ids=np.append(example.input_ids, np.int32([7, 8])),
        labels=np.append(example.labels, np.int32([-100, -100])),
    )
    others = replace(padded, input_ids=np.append(example.input_ids, np.int32([300, 301])))
    assert measure(padded) == measure(others) == pytest.approx(loss, rel=1e-6)


def test_the_loss_of_a_batch_made_by_hand() -> None:
    """A network whose last norm is 0 gives every word the same probability: the loss is ln(vocabulary) per id."""
    model = load_training_model()
    with torch.no_grad():
        model.network.llm.model.norm.weight.zero_()
    loss, count = model.loss_sum(make_batch(model, make_examples()))
    words = model.network.config.language.vocab_size
    assert count == sum(example.num_targets for example in make_examples())
    assert float(loss.detach()) == pytest.approx(count * np.log(words), rel=1e-6)


def test_a_row_that_does_not_fit_is_refused_with_both_numbers() -> None:
    turns, images = [("user", "What?"), ("assistant", "A long answer, " * 5)], draw_images(0, (2, 2))
    length = len(make_builder().build_dialogue(turns, images).input_ids)
    assert len(make_builder(max_length=length).build_dialogue(turns, images).input_ids) == length
    with pytest.raises(ExampleTooLongError, match=f"{length} tokens, more than max_length={length - 1};") as caught:
        make_builder(max_length=length - 1).build_dialogue(turns, images)
    assert (caught.value.length, caught.value.max_length) == (length, length - 1)
    with pytest.raises(ExampleTooLongError):
        make_builder(max_length=length - 1).build_preference(turns[:1], "Yes", turns[1][1], images)


REFUSED = {
    "only a system prompt": ([("system", "Be brief.")], "no turns of a user"),
    "no turns": ([], "no turns of a user"),
    "no answer": ([("user", "What?")], "last turn must be the assistant's"),
    "two questions": ([("user", "What?"), ("user", "Where?"), ("assistant", "Here")], "must alternate"),
    "an empty answer": ([("user", "What?"), ("assistant", " \n")], "the answer in turn 2 is empty"),
    "an image in an answer": ([("user", "What?"), ("assistant", "<image>")], "only users show images"),
    "an unknown role": ([("function", "What?"), ("assistant", "Here")], "roles of the dialogue are function"),
    "a mark too many": ([("user", "<image> <image>"), ("assistant", "Here")], "2 <image> marks for 1 image;"),
    "not Unicode": ([("user", "What?"), ("assistant", "\ud800")], "surrogate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dialogues_that_teach_nothing_are_refused(case: str) -> None:
    turns, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_builder().build_dialogue(turns, draw_images(0, (1, 1)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [("A", "A", "are equal"), ("", "A", "chosen answer is empty"), ("A", " ", "rejected")],
)
def test_pairs_that_teach_nothing_are_refused(chosen: str, rejected: str, message: str) -> None:
    with pytest.raises(ExampleError, match=message):
        make_builder().build_preference([("user", "What?")], chosen, rejected)
    with pytest.raises(ExampleError, match="last turn must be the user's"):
        make_builder().build_preference([("user", "What?"), ("assistant", "This")], "A", "B")


def test_an_empty_caption_is_refused() -> None:
    with pytest.raises(ExampleError, match="caption is empty"):
        make_builder().build_caption("<image>", " ", draw_images(0, (1, 1)))


def test_an_example_is_shown_with_what_is_learnt() -> None:
    turns = [("user", "<image>\nWhat?"), ("assistant", "A ball."), ("user", "Sure?"), ("assistant", "Yes")]
    example = make_builder().build_dialogue(turns, draw_images(0, (1, 2)))
    assert render_example(example, load_tokenizer(TINY)) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image x12>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n[[A ball.<|im_end|>]]\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n[[Yes<|im_end|>]]"
    )
