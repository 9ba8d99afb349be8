"""Equal to transformers' own Ovis2, given the same pixels and ids and with the norm that it adds to the tower."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ovis_model.engine import OvisEngine
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID, Request, SamplingParams
from tests.golden_data import CHECKPOINTS, checkpoint_dir
from tests.test_engine import golden_requests, pixels_of, prompt_logits

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("post_trunk_norm", [True, False])
def test_logits_and_greedy_ids_equal_transformers(checkpoint: str, post_trunk_norm: bool) -> None:
    directory = checkpoint_dir(checkpoint, "native")
    engine = OvisEngine.from_pretrained(str(directory), device="cpu", dtype="float32", post_trunk_norm=post_trunk_norm)
    peer = transformers.Ovis2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    if not post_trunk_norm:
        peer.model.vision_tower.transformer.rms_norm = torch.nn.Identity()
    ids_of = _native_ids(json.loads((directory / "config.json").read_text()))
    for request in golden_requests(checkpoint):
        inputs = {"input_ids": torch.from_numpy(ids_of(request)).long()[None]}
        if len(request.tiles):
            inputs["pixel_values"] = pixels_of(engine.model, request)
        with torch.inference_mode():
            wanted = peer(**inputs).logits[0]
        ours = prompt_logits(engine.model, request)
        np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=0)
        [completion] = engine.generate([request], SamplingParams(max_new_tokens=12))
        assert completion.output_ids.tolist() == _generate(peer, inputs)


def _generate(peer: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[int]:
    with torch.inference_mode():
        out = peer.generate(**inputs, do_sample=False, max_new_tokens=12)
    ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def _native_ids(config: dict[str, list[int]]):  # type: ignore[no-untyped-def]
    """transformers gives the placeholders ids of its own: one for the atom, five for the indicators."""
    indicators = np.array(config["visual_indicator_token_ids"])

    def convert(request: Request) -> np.ndarray:
        ids = request.input_ids.copy()
        ids[request.input_ids == IMAGE_ATOM_ID] = config["image_token_id"]
        at = request.input_ids <= IMAGE_START_ID
        ids[at] = indicators[IMAGE_START_ID - request.input_ids[at]]
        return ids

    return convert
