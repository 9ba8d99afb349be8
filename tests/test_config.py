"""Checkpoint configurations: both layouts agree, the published sizes add up, unsupported settings are refused."""

from __future__ import annotations

import json

import pytest
import torch

from ovis_model.config import SIZES, ConfigError, OvisConfig, parse_config
from ovis_model.network.weights import allocate_model
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir

# Numbers of unique parameters that the published configurations imply.
PARAMETERS = {
    "1B": 1_131_283_318,
    "2B": 2_222_907_894,
    "4B": 4_304_941_558,
    "8B": 8_935_282_678,
    "16B": 16_190_363_126,
    "34B": 34_872_912_886,
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(size: str) -> None:
    model = allocate_model(SIZES[size], device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]


def test_a_full_size_tile_is_256_tokens() -> None:
    assert SIZES["1B"].vision.tokens_per_tile == 256


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_both_checkpoint_layouts_parse_to_the_same_shapes(checkpoint: str) -> None:
    aidc, native = (OvisConfig.from_directory(checkpoint_dir(checkpoint, layout)) for layout in ("aidc", "native"))
    assert (aidc.vision, aidc.language) == (native.vision, native.language)
    assert aidc.eos_token_ids == native.eos_token_ids
    assert (aidc.layout, native.layout) == ("aidc", "native")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "llava", "model_type='llava'"),
        (
            ("visual_tokenizer_config", "tokenize_function"),
            "gumbel_argmax",
            "tokenize_function='gumbel_argmax'",
        ),
        (("visual_tokenizer_config", "backbone_config", "qkv_bias"), True, "qkv_bias=True"),
        (("visual_tokenizer_config", "backbone_config", "patch_size"), 15, "patch_size=15"),
        (("llm_config", "rope_scaling"), {"rope_type": "yarn"}, "rope_type='yarn'"),
        (("llm_config", "rope_scaling"), {"type": "yarn"}, "type='yarn'"),
        (("visual_tokenizer_config",), {}, "lacks backbone_config"),
        (("llm_config", "num_key_value_heads"), 3, "num_key_value_heads=3"),
        (("llm_config", "hidden_size"), None, "lacks hidden_size"),
        (("quantization_config",), {"bits": 4}, "quantized"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(path: tuple[str, ...], value: object, message: str) -> None:
    config = json.loads((checkpoint_dir("tiny56-tied", "aidc") / "config.json").read_text())
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        parse_config(config, {})
