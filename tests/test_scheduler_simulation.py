"""Rows of any lengths keep a GPU's cache full, and the plan of each GPU is that of hand arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scheduler import CASES, CONTEXT_BYTES, PROMPT, compare_with_uniform, list_plans, plan_memory, simulate
from ovis_model.config import SIZES
from ovis_model.engine.memory_plan import divide_into_pages, fix_slots


@pytest.mark.parametrize("case", CASES)
def test_a_mix_of_lengths_takes_about_the_steps_of_equal_ones(case: str) -> None:
    """34B on two GPUs has the fewest rows at once, so it suffers most."""
    prompts = CASES[case](np.random.default_rng(0), 1000)
    assert compare_with_uniform(divide_into_pages(plan_memory("34B", 2, 80)), prompts)["x uniform"] < 1.15


def test_one_very_long_row_costs_less_than_three_percent() -> None:
    budget = divide_into_pages(plan_memory("34B", 2, 80))
    prompts = np.full(4000, PROMPT)
    uniform = simulate(budget, prompts)
    prompts[1000] = 16_000
    assert simulate(budget, prompts).steps < 1.03 * uniform.steps


def test_slots_of_one_capacity_come_back_after_a_long_row() -> None:
    """Where no kernel reads pages, the running rows finish once more; then the slots are short again."""
    budget = fix_slots(SIZES["34B"], plan_memory("34B", 2, 80))
    prompts = np.full(2000, PROMPT)
    uniform = simulate(budget, prompts)
    prompts[500] = 16_000
    found = simulate(budget, prompts)
    assert found.slots == uniform.slots
    assert found.steps < 1.3 * uniform.steps


HAND = {
    # size: parameters, layers, key-value heads, head size, hidden size, MLP size, vocabulary
    "1B": (1_131_283_318, 24, 2, 64, 896, 4864, 151_936),
    "2B": (2_222_907_894, 28, 2, 128, 1536, 8960, 151_936),
    "4B": (4_304_941_558, 36, 2, 128, 2048, 11_008, 151_936),
    "8B": (8_935_282_678, 28, 4, 128, 3584, 18_944, 152_064),
    "16B": (16_190_363_126, 48, 8, 128, 5120, 13_824, 152_064),
    "34B": (34_872_912_886, 64, 8, 128, 5120, 27_648, 152_064),
}


def count_tokens_by_hand(size: str, memory_gb: float, quantized: float = 0.0) -> int:
    """Count the tokens in the cache: nine tenths of what weights and CUDA leave, without the largest pass.

    The pass is a prompt of 32,768 tokens and the logits of 128 rows, or of 16 tiles where that is more; if it takes
    more than a third, it is halved until it does not. So many of the parameters are `quantized` to one byte.
    """
    parameters, layers, kv_heads, head_dim, hidden, mlp, vocabulary = HAND[size]
    usable = 0.9 * (memory_gb * 1e9 - 2 * parameters + quantized - CONTEXT_BYTES)
    token = 2 * (8 * hidden + 2 * mlp) + 8 * hidden + 16 * head_dim
    row = vocabulary * 58 + 2 * (8 * hidden + 4 * mlp)
    part = 1.0
    while (32_768 * token + 128 * row) * part > usable / 3:
        part /= 2
    left = usable - max((32_768 * token + 128 * row) * part, 16 * 0.1e9 * part)
    tokens = left / (2 * layers * kv_heads * head_dim * 2)
    return int(min(tokens, 128 * part * 32_768)) if tokens >= 1024 else 0


@pytest.mark.parametrize("memory_gb", [24, 48, 80, 141])
@pytest.mark.parametrize("size", SIZES)
def test_the_plan_is_that_of_hand_arithmetic(size: str, memory_gb: int) -> None:
    wanted = count_tokens_by_hand(size, memory_gb) if memory_gb * 1e9 > 2 * HAND[size][0] + CONTEXT_BYTES else 0
    if not wanted:
        with pytest.raises(ValueError, match="too little to generate"):
            plan_memory(size, 1, memory_gb)
        return
    assert divide_into_pages(plan_memory(size, 1, memory_gb)).kv_tokens == pytest.approx(wanted, rel=0.03)


def test_34b_in_fp8_has_room_for_35_images_on_80_gb() -> None:
    layers = 64 * 5120 * (2 * 5120 + 2 * 1024 + 3 * 27_648)
    blocks = 24 * 2048 * (4 * 2048 + 3 * 5632)
    plan = divide_into_pages(plan_memory("34B", 1, 80, "fp8"))
    assert plan.kv_tokens == pytest.approx(count_tokens_by_hand("34B", 80, layers + blocks), rel=0.03)
    [listed] = (p for p in list_plans("fp8") if (p["size"], p["GPUs"]) == ("34B", "1 x 80 GB"))
    assert listed["images at once"] == 35 and listed["longest prompt"] == 32_768


def test_all_plans_are_listed() -> None:
    plans = list(list_plans())
    assert {plan["size"] for plan in plans} == set(SIZES)
    assert all(plan["images at once"] >= 7 for plan in plans)


def test_pages_hold_as_many_tokens_as_slots() -> None:
    plan = plan_memory("8B", 1, 80)
    pages = divide_into_pages(plan)
    assert 0 < plan.kv_tokens - pages.kv_tokens < 2 * pages.page_tokens
