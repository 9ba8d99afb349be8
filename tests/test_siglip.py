"""The frame encoder gives transformers' vectors, takes long texts, loads safely, and selects the right frames."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SiglipModel

from ovis_model.inputs.keyframes import select_frames
from ovis_model.network.siglip import SiglipEncoder
from tests.support.golden_data import checkpoint_dir
from tests.support.objects import OBJECTS, Object, draw_scenes
from tests.support.roots import TINY_SIGLIP


@cache
def load_encoder() -> SiglipEncoder:
    return SiglipEncoder.from_pretrained(str(TINY_SIGLIP))


def draw_pixels(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_vectors_are_those_of_transformers() -> None:
    model, tokenizer = SiglipModel.from_pretrained(TINY_SIGLIP), AutoTokenizer.from_pretrained(TINY_SIGLIP)
    pictures = draw_pixels(0, 40)
    with torch.no_grad():
        normalised = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        images = model.get_image_features(normalised).pooler_output
        # The format of SigLIP's training: the text, an end mark, padding to the full length.
        ids = [*tokenizer("where is a red circle", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        padded = torch.tensor([ids + [tokenizer.pad_token_id] * (16 - len(ids))])
        text = model.get_text_features(padded).pooler_output
    assert np.allclose(load_encoder().encode_frames(pictures), torch.nn.functional.normalize(images).numpy(), atol=1e-5)
    expected = torch.nn.functional.normalize(text)[0].numpy()
    assert np.allclose(load_encoder().encode_text("where is a red circle"), expected, atol=1e-5)


def test_vectors_are_float32_of_unit_length_in_batches_of_any_size() -> None:
    for count in (1, 31, 32, 33, 65):
        vectors = load_encoder().encode_frames(draw_pixels(1, count))
        assert vectors.dtype == np.float32
        assert vectors.shape == (count, 48)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(
        load_encoder().encode_frames(draw_pixels(1, 65))[:5], load_encoder().encode_frames(draw_pixels(1, 5)), atol=1e-5
    )


def test_a_long_text_is_the_mean_of_its_parts() -> None:
    """The parts have 15 tokens each; the 16th is the end mark."""
    first, second, rest = "a red circle " * 5, "a blue cross " * 5, "the video"
    parts = np.stack([load_encoder().encode_text(part) for part in (first, second, rest)])
    mean = parts.mean(axis=0)
    assert np.allclose(load_encoder().encode_text(first + second + rest), mean / np.linalg.norm(mean), atol=1e-5)
    assert np.allclose(load_encoder().encode_text(first), parts[0])
    assert np.isfinite(load_encoder().encode_text("")).all()


def test_pickled_weights_and_other_models_are_refused(tmp_path: Path) -> None:
    pickled = shutil.copytree(TINY_SIGLIP, tmp_path / "pickled")
    weights = SiglipModel.from_pretrained(TINY_SIGLIP).state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        SiglipEncoder.from_pretrained(str(pickled))
    other = checkpoint_dir("tiny56-tied", "native")
    with pytest.raises(ValueError, match="holds ovis2; give a SigLIP"):
        SiglipEncoder.from_pretrained(str(other))


def test_the_tiny_checkpoint_is_small_and_recognises_its_objects() -> None:
    assert sum(path.stat().st_size for path in TINY_SIGLIP.iterdir()) < 1 << 20
    texts = np.stack([load_encoder().encode_text(thing.text) for thing in OBJECTS])
    right = []
    for seed in range(20):
        chosen, frames = encode_scenes(1000 + seed)
        right += [OBJECTS[i] == chosen[number // 16] for number, i in enumerate(np.argmax(frames @ texts.T, axis=1))]
    assert np.mean(right) > 0.6


@cache
def encode_scenes(seed: int) -> tuple[list[Object], np.ndarray]:
    chosen, images = draw_scenes(seed)
    return chosen, load_encoder().encode_frames(np.stack([np.asarray(image.resize((32, 32))) for image in images]))


def select_objects(seed: int, method: str) -> list[Object]:
    """Select eight of 128 frames with the fourth scene's object as query; return the objects that they show."""
    chosen, frames = encode_scenes(seed)
    query = load_encoder().encode_text(chosen[3].text)
    return [chosen[i // 16] for i in select_frames(frames, query, 8, method=method).tolist()]  # type: ignore[arg-type]


def test_top_k_finds_the_queried_object_and_mdp3_also_shows_others() -> None:
    """Measured on videos of eight scenes with one object each, and compared with evenly spaced frames."""
    seeds = range(30)
    asked = {seed: encode_scenes(seed)[0][3] for seed in seeds}
    share = {
        method: np.mean([thing == asked[seed] for seed in seeds for thing in select_objects(seed, method)])
        for method in ("uniform", "top-k", "mdp3")
    }
    distinct = {
        method: np.mean([len(set(select_objects(seed, method))) for seed in seeds])
        for method in ("uniform", "top-k", "mdp3")
    }
    assert share["top-k"] >= 0.8
    assert share["top-k"] >= share["mdp3"] > 2 * share["uniform"]
    assert distinct["uniform"] > distinct["mdp3"] > distinct["top-k"]
    for seed in seeds:
        assert asked[seed] in select_objects(seed, "mdp3")
