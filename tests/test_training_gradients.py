"""The gradients of every stage equal those of transformers' Ovis2, and do not depend on how a batch is computed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovis_model.network.weights import find_targets
from ovis_model.training.examples import TrainingExample
from ovis_model.training.model import TrainingModel
from ovis_model.training.parts import list_trainable
from ovis_model.training.stages import STAGES, Stage
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID, Request, SamplingParams
from tests.support.engines import load_engine
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir
from tests.support.training import (
    TINY,
    compute_gradients,
    draw_images,
    load_training_model,
    make_batch,
    make_builder,
    make_examples,
    measure_difference,
)

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("3", "dpo")])  # they train as 2 and 4
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_gradients_equal_transformers(checkpoint: str, stage: Stage) -> None:
    model = load_training_model(checkpoint_dir(checkpoint), STAGES[stage])
    examples = make_examples(checkpoint_dir(checkpoint))
    found = convert_names(model, compute_gradients(model, make_batch(model, examples)))
    loss, wanted = compute_peer_gradients(checkpoint, model, examples)
    ours, count = model.loss_sum(make_batch(model, examples))
    assert float(ours.detach()) / count == pytest.approx(loss, rel=1e-6)
    assert found.keys() == wanted.keys() if stage == "4" else 0 < len(found) < len(wanted)
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm()), name


def convert_names(model: TrainingModel, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients by transformers' names; it splits some matrices."""
    network = copy.deepcopy(model.network).requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.data = gradients.get(name, torch.full_like(parameter, torch.nan))
    found = {name: target.tensor for name, target in find_targets(network, "native").items()}
    return {name: gradient for name, gradient in found.items() if not gradient.isnan().any()}


def compute_peer_gradients(
    checkpoint: str, model: TrainingModel, examples: Sequence[TrainingExample]
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of all parameters for a batch padded on the right."""
    directory = checkpoint_dir(checkpoint, "native")
    peer = transformers.Ovis2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).train()
    peer.model.vision_tower.transformer.rms_norm = torch.nn.Identity()
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    ids = [torch.from_numpy(convert_ids(example.input_ids, config)) for example in examples]
    labels = [torch.from_numpy(example.labels).long() for example in examples]
    pad = torch.nn.utils.rnn.pad_sequence
    tiles, sizes = (np.concatenate([getattr(x, name) for x in examples]) for name in ("tiles", "tile_sizes"))
    loss = peer(
        input_ids=pad(ids, batch_first=True),
        attention_mask=pad([torch.ones_like(x) for x in ids], batch_first=True),
        labels=pad(labels, batch_first=True, padding_value=-100),
        pixel_values=model.network.normalize(torch.from_numpy(tiles), torch.from_numpy(sizes)),
    ).loss
    loss.backward()
    return float(loss.detach()), {name: x.grad for name, x in peer.named_parameters() if x.grad is not None}


def convert_ids(ids: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Return transformers' ids of placeholders."""
    native, is_indicator = ids.astype(np.int64), ids <= IMAGE_START_ID
    native[ids == IMAGE_ATOM_ID] = config["image_token_id"]
    native[is_indicator] = np.array(config["visual_indicator_token_ids"])[IMAGE_START_ID - ids[is_indicator]]
    return native


VARIANTS = {
    "layers recomputed": {"checkpoint_layers": True},
    "head and logits stored": {"recompute_head": False},
    "all recomputed": {"checkpoint_layers": True, "recompute_head": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_changes_nothing(variant: str) -> None:
    examples, wanted = make_examples(), {}
    for name, options in {"stored": {"recompute_head": False}, variant: VARIANTS[variant]}.items():
        model = load_training_model(TINY, STAGES["4"], **options)
        wanted[name] = compute_gradients(model, make_batch(model, examples))
    assert all(torch.equal(wanted["stored"][name], x) for name, x in wanted[variant].items())


def test_accumulated_and_packed_gradients_are_those_of_one_batch() -> None:
    """Rows have unequal numbers of answers, so that a mean of means would differ."""
    model, examples = load_training_model(), [*make_examples(), *make_examples()[::-1]]
    assert len({example.num_targets for example in examples}) > 2
    wanted = compute_gradients(model, make_batch(model, examples))
    for size in (1, 2, 4):
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        found = compute_gradients(model, *(make_batch(model, part) for part in parts))
        assert measure_difference(found, wanted) < 1e-5, size


def test_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = load_training_model(), make_examples()
    wanted = compute_gradients(model, make_batch(model, examples))
    monkeypatch.setattr("ovis_model.training.model.LOGIT_CHUNK_TOKENS", 3)
    monkeypatch.setattr("ovis_model.training.model.HEAD_CHUNK_TOKENS", 5)
    assert measure_difference(compute_gradients(model, make_batch(model, examples)), wanted) < 1e-5


def test_examples_of_the_same_images_share_them_and_learn_as_if_alone() -> None:
    builder, images, model = make_builder(), draw_images(5, (1, 2), (1, 1)), load_training_model()
    asked = [
        builder.build_dialogue([("user", question), ("assistant", answer)], images)
        for question, answer in [
            ("<image> <image> What is it?", "A cat"),
            ("<image> <image> Where?", "On a sofa, asleep"),
        ]
    ]
    # Another system prompt: not even the images' placeholders are a common beginning.
    asked.append(
        builder.build_dialogue([("system", "Be brief."), ("user", "<image> or <image>?"), ("assistant", "A")], images)
    )
    batch = make_batch(model, [*make_examples(), *asked[:2]])
    alone = [make_batch(model, [x]) for x in (*make_examples(), *asked[:2])]
    assert len(batch.tiles) == sum(len(x.tiles) for x in alone[:-1]) - 1  # less the black tile of the text
    assert len(batch.input_ids) < sum(len(x.input_ids) for x in alone)
    assert measure_difference(compute_gradients(model, batch), compute_gradients(model, *alone)) < 1e-5
    apart = [make_batch(model, [x]) for x in asked]
    together = make_batch(model, asked)
    assert len(together.tiles) == len(images.tiles)
    assert measure_difference(compute_gradients(model, together), compute_gradients(model, *apart)) < 1e-5


def test_a_batch_of_texts_teaches_the_language_model_as_without_the_black_tile() -> None:
    examples = [example for example in make_examples() if not len(example.tiles)]
    both, llm = load_training_model(), load_training_model(TINY, "llm")
    found, wanted = (compute_gradients(model, make_batch(model, examples)) for model in (both, llm))
    assert wanted
    for name, gradient in found.items():
        if name.startswith("llm."):
            assert torch.equal(gradient, wanted[name]), name
        else:
            assert not gradient.any(), name
    assert found.keys() == compute_gradients(both, make_batch(both, make_examples())).keys()


def test_a_batch_without_labels_has_no_loss_and_gradients_of_zero() -> None:
    model, example = load_training_model(), make_examples()[0]
    batch = make_batch(model, [replace(example, labels=np.full_like(example.labels, -100))])
    loss, count = model.loss_sum(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (float(loss.detach()), count) == (0.0, 0)
    assert all(not x.grad.any() for x in list_trainable(model.network).values() if x.grad is not None)


def test_the_loss_is_that_of_the_engines_prefill() -> None:
    """The mean log-probability of generated ids equals the loss that teaches them."""
    engine, model = load_engine("tiny56-tied"), load_training_model()
    for example in make_examples():
        prompt = example.input_ids[: int(np.flatnonzero(example.labels >= 0)[0])]
        request = Request(prompt, example.tiles, example.tile_sizes)
        [completion] = engine.generate([request], SamplingParams(max_new_tokens=9))
        ids = np.concatenate([prompt, completion.output_ids])
        labels = np.concatenate([np.full_like(prompt, -100), completion.output_ids])
        taught = TrainingExample(ids, labels, example.tiles, example.tile_sizes)
        loss, count = model.loss_sum(make_batch(model, [taught]))
        assert float(loss.detach()) / count == pytest.approx(-completion.mean_logprob, abs=1e-5)


def test_bfloat16_stays_close_and_keeps_what_is_trained_in_float32() -> None:
    exact, rounded = (
        load_training_model(TINY, STAGES["1"], precision=precision, checkpoint_layers=True)
        for precision in ("float32", "bfloat16")
    )
    examples = make_examples()
    losses = [float(model.loss_sum(make_batch(model, examples))[0].detach()) for model in (exact, rounded)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)
    for name, parameter in rounded.network.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert measure_difference(*(compute_gradients(m, make_batch(m, examples)) for m in (rounded, exact))) < 0.2
