"""The gradients of every stage equal those of transformers' Ovis2, and do not depend on how a batch is computed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovis_model.network.weights import find_targets
from ovis_model.training.examples import TrainingExample
from ovis_model.training.model import TrainingModel
from ovis_model.training.parts import STAGES, Stage
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir
from tests.support.training import (
    compute_gradients,
    load_training_model,
    make_batch,
    make_examples,
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
