"""The estimate of training's memory equals the table for the published sizes, and counts what the network has."""

from __future__ import annotations

import pytest
import torch

from ovis_model.config import SIZES, OvisConfig
from ovis_model.network.ovis import Ovis
from ovis_model.training.lora import LoraConfig, add_adapters
from ovis_model.training.memory import (
    TrainingMemory,
    TrainingMemoryError,
    count_decoder_checkpoint_bytes,
    estimate_training_memory,
)
from ovis_model.training.parts import choose_trainable, list_trainable
from ovis_model.training.stages import STAGES

# Millions of trained parameters and GB of weights, gradients and moments, per size.
TABLE = {
    "1B": {"1": (340, 7), "2": (637, 11), "4": (None, 18), "lora": (8.8, 2.4), "row": 0.11},
    "2B": {"1": (382, 10), "2": (679, 14), "4": (None, 36), "lora": (18.5, 4.7), "row": 0.22},
    "4B": {"1": (565, 17), "2": (1219, 26), "4": (None, 69), "lora": (29.9, 9.0), "row": 0.38},
    "8B": {"1": (666, 27), "2": (1320, 36), "4": (None, 143), "lora": (40.4, 18.4), "row": 0.52},
    "16B": {"1": (767, 43), "2": (1420, 52), "4": (None, 259), "lora": (68.8, 33), "row": 1.3},
    "34B": {"1": (924, 83), "2": (2109, 99), "4": (None, 558), "lora": (134, 72), "row": 1.7},
}


def estimate(config: OvisConfig, parts: str, **options: int) -> TrainingMemory:
    return estimate_training_memory(config, parts, num_tokens=2600, num_tiles=10, **options)


@pytest.mark.parametrize("size", SIZES)
def test_the_estimate_equals_the_table(size: str) -> None:
    for stage in ("1", "2", "4", "lora"):
        trained, gb = TABLE[size][stage]  # type: ignore[misc]
        rank = 16 if stage == "lora" else 0
        found = estimate(SIZES[size], STAGES.get(stage, "lora"), lora_rank=rank)  # type: ignore[call-overload]
        # The table is rounded to whole numbers.
        assert found.states / 1e9 == pytest.approx(gb, rel=0.03, abs=0.55)
        if trained is not None:
            assert found.num_trained / 1e6 == pytest.approx(trained, rel=0.03)
    row_gb = count_decoder_checkpoint_bytes(SIZES[size].language, 2600, 2) / 1e9
    assert row_gb == pytest.approx(TABLE[size]["row"], rel=0.03)


@pytest.mark.parametrize("parts", [*dict.fromkeys(STAGES.values()), "lora", "lora|vte", "llm", "visual_tokenizer.head"])
def test_the_estimate_counts_the_parameters_of_the_network(parts: str) -> None:
    with torch.device("meta"):
        network = Ovis(SIZES["1B"])
        if "lora" in parts:
            add_adapters(network, LoraConfig(rank=16))
    choose_trainable(network, parts)
    found = estimate(SIZES["1B"], parts, lora_rank=16 if "lora" in parts else 0)
    assert found.num_trained == sum(x.numel() for x in list_trainable(network).values())
    assert found.num_trained + found.num_frozen == sum(x.numel() for x in network.parameters())


def test_a_device_that_is_too_small_is_refused_with_the_shortfall() -> None:
    needed = estimate(SIZES["8B"], STAGES["4"])
    with pytest.raises(TrainingMemoryError, match=r"needs \d+\.\d GB per device .* GB too few"):
        needed.check_fits(80 << 30)
    estimate(SIZES["8B"], STAGES["4"], num_shards=4).check_fits(80 << 30)
    estimate(SIZES["1B"], STAGES["4"]).check_fits(80 << 30)


def test_a_frozen_tower_stores_nothing() -> None:
    frozen, last, all_blocks = (estimate(SIZES["1B"], parts).checkpoints for parts in ("vte", STAGES["1"], STAGES["2"]))
    one_block = 10 * 1024 * 1024 * 2
    assert (last - frozen, all_blocks - frozen) == (one_block, 24 * one_block)
