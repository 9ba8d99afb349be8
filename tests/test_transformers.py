"""The model equals transformers' Ovis2 for the same pixels and ids, with the norm that it adds to the vision tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.prompt import expand_atoms, make_placeholders
from ovis_model.network.weights import load_model
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID, Grid, Request, SamplingParams
from tests.support.engines import compute_logits, make_golden_requests, normalize_tiles
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("post_trunk_norm", [True, False])
def test_logits_and_greedy_ids_equal_transformers(checkpoint: str, post_trunk_norm: bool) -> None:
    directory = checkpoint_dir(checkpoint, "native")
    engine = OvisEngine.from_pretrained(str(directory), device="cpu", dtype="float32", post_trunk_norm=post_trunk_norm)
    peer = transformers.Ovis2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    if not post_trunk_norm:
        peer.model.vision_tower.transformer.rms_norm = torch.nn.Identity()
    ids_of = _make_native_converter(json.loads((directory / "config.json").read_text()))
    for request in make_golden_requests(checkpoint):
        inputs = {"input_ids": torch.from_numpy(ids_of(request)).long()[None]}
        if len(request.tiles):
            inputs["pixel_values"] = normalize_tiles(engine.model, request)
        with torch.inference_mode():
            wanted = peer(**inputs).logits[0]
        ours = compute_logits(engine.model, request)
        np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=0)
        [completion] = engine.generate([request], SamplingParams(max_new_tokens=12))
        assert completion.output_ids.tolist() == _generate(peer, inputs)


def _generate(peer: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[int]:
    with torch.inference_mode():
        out = peer.generate(**inputs, do_sample=False, max_new_tokens=12)
    ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def _make_native_converter(config: dict[str, list[int]]):  # type: ignore[no-untyped-def]
    """Return a function that converts a request's placeholders to transformers' ids: one atom and five indicators."""
    indicators = np.array(config["visual_indicator_token_ids"])

    def convert(request: Request) -> np.ndarray:
        ids = request.input_ids.copy()
        ids[request.input_ids == IMAGE_ATOM_ID] = config["image_token_id"]
        at = request.input_ids <= IMAGE_START_ID
        ids[at] = indicators[IMAGE_START_ID - request.input_ids[at]]
        return ids

    return convert


SHAPES = {
    "stride 3, one vision head": {"vision": {"image_size": 84, "hidden_stride": 3, "num_attention_heads": 1}},
    "one key head": {"text": {"num_key_value_heads": 1}},
    "as many key heads as heads, untied": {"text": {"num_key_value_heads": 4}, "tied": False},
    "another base and norm": {"text": {"rope_theta": 50_000.0, "rms_norm_eps": 1e-3}, "vision": {"rms_norm_eps": 1e-3}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_equal_transformers(tmp_path: Path, shape: str) -> None:
    """The models are random, made and saved by transformers."""
    torch.manual_seed(0)
    peer = transformers.Ovis2ForConditionalGeneration(_make_peer_config(SHAPES[shape])).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    peer.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32, post_trunk_norm=True)
    vision = model.config.vision
    request = _make_random_request(vision.image_size, vision.tokens_per_tile)
    to_native = _make_native_converter({"image_token_id": 90, "visual_indicator_token_ids": [91, 92, 93, 94, 95]})  # type: ignore[dict-item]
    with torch.inference_mode():
        ids = torch.from_numpy(to_native(request)).long()[None]
        wanted = peer(input_ids=ids, pixel_values=normalize_tiles(model, request)).logits[0]
    np.testing.assert_allclose(compute_logits(model, request), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def _make_peer_config(changes: dict[str, Any]) -> Any:
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "model_type": "qwen2",
        **changes.get("text", {}),
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vocab_size": 133,
        "hidden_stride": 2,
        **changes.get("vision", {}),
    }
    return transformers.Ovis2Config(
        text_config=text,
        vision_config=vision,
        hidden_size=64,
        vocab_size=128,
        image_token_id=90,
        visual_indicator_token_ids=[91, 92, 93, 94, 95],
        tie_word_embeddings=changes.get("tied", True),
    )


def _make_random_request(side: int, tokens_per_tile: int) -> Request:
    """Make a request with two images, one of them of three tiles, between random text."""
    rng = np.random.default_rng(0)
    grids = [Grid(1, 1), Grid(1, 2)]
    placeholders = [expand_atoms(make_placeholders(grid), tokens_per_tile) for grid in grids]
    text = [rng.integers(0, 90, n) for n in (5, 3, 7)]
    ids = np.concatenate([text[0], placeholders[0], text[1], placeholders[1], text[2]]).astype(np.int32)
    tiles = rng.integers(0, 256, (4, 3, side, side), dtype=np.uint8)
    return Request(ids, tiles, np.array([[side, side], [side, 20], [11, side], [side, side]], np.int32))
