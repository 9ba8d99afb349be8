"""Plan how many sequences, tiles and tokens fit on a device at once, from its free memory and the model's sizes.

Each `bound_` function is an upper bound on the allocations of a pass, so a plan fits by construction.
`tests/test_memory.py` counts the allocations of all published sizes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ovis_model.config import OvisConfig
from ovis_model.engine.kv_cache import compute_bytes_per_token
from ovis_model.engine.scheduler import Budget
from ovis_model.network.attention import PAGE_TOKENS, find_kernels
from ovis_model.network.layers import WIDENED_VALUES, choose_pass_dtype
from ovis_model.network.tensor_parallel import Shard
from ovis_model.network.vision import HEAD_CHUNK_TOKENS

_MAX_BUDGET = Budget(kv_tokens=0)
MIN_PREFILL_TOKENS = 2048
"""Prompt tokens that fill a GPU; with fewer, a pass takes as long as the launches of its kernels."""
_MIN_KV_TOKENS = 1024
"""Room for one tile, a question and an answer; starting with less is pointless."""


def measure_free_bytes(device: torch.device) -> int:
    """Return the free bytes: all on CUDA, half on a CPU, because rows are also prepared and written there."""
    if device.type == "cuda":
        # Fusing weights left blocks in torch's cache, which CUDA counts as taken: 11 GB for a rank of two of 34B.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(_read_available_bytes(), _read_cgroup_bytes()) // 2


def plan_for_device(config: OvisConfig, dtype: torch.dtype, device: torch.device, shard: Shard) -> Budget:
    """Plan from the memory that is free now; all ranks get the same plan. On a CPU the ranks share its memory.

    On CUDA the whole cache is allocated at once; on a CPU it grows with the sequences.
    """
    is_cuda = device.type == "cuda"
    free = shard.reduce_min(measure_free_bytes(device) // (1 if is_cuda else shard.size))
    local = replace(config, language=shard.to_local(config.language))
    budget = plan_budget(local, dtype, free, choose_pass_dtype(dtype, device))
    if not is_cuda:
        return budget
    budget = replace(budget, min_prefill_tokens=MIN_PREFILL_TOKENS)
    reads_pages = shard.reduce_min(int(find_kernels(device, dtype).reads_pages))
    return divide_into_pages(budget) if reads_pages else fix_slots(config, budget)


def divide_into_pages(budget: Budget) -> Budget:
    """Return the budget with keys and values in pages, of which one holds what padding writes."""
    pages = budget.kv_tokens // PAGE_TOKENS - 1
    return replace(budget, kv_tokens=pages * PAGE_TOKENS, page_tokens=PAGE_TOKENS)


def fix_slots(config: OvisConfig, budget: Budget) -> Budget:
    """Return the budget with slots that have room for a usual request, so that the first ones need no other cache.

    That is an image of ten tiles and 640 tokens of question and answer.
    """
    usual = min(10 * config.vision.tokens_per_tile + 640, budget.kv_tokens)
    return replace(budget, slot_tokens=max(budget.kv_tokens // budget.slots, usual))


def plan_budget(config: OvisConfig, dtype: torch.dtype, free: int, passes: torch.dtype | None = None) -> Budget:
    """Return the largest budget that fits in `free` bytes, of which a tenth stays unused because of fragmentation.

    Passes get up to a third, keys and values the rest. `passes` is the dtype of the passes' activations if it differs
    from `dtype`; see `layers.choose_pass_dtype`. Raise ValueError if not even a short sequence fits.
    """
    usable = free * 9 // 10
    budget = replace(_MAX_BUDGET, prompt_tokens=config.max_length, max_tokens=config.max_length)
    while bound_transient_bytes(config, dtype, budget, passes) > usable // 3 and budget.prompt_tokens > 1:
        budget = replace(halve(budget), prompt_tokens=budget.prompt_tokens // 2)
    fit = (usable - bound_transient_bytes(config, dtype, budget, passes)) // compute_bytes_per_token(
        config.language, dtype
    )
    if fit < _MIN_KV_TOKENS:
        raise ValueError(
            f"{free / 1e9:.1f} GB are free after loading the weights, too little to generate; free memory on the "
            "device, use a larger one, or load the model in bfloat16"
        )
    return replace(budget, kv_tokens=min(fit, budget.slots * config.max_length))


def halve(budget: Budget) -> Budget:
    """Halve the numbers of sequences, tokens and tiles that are processed at once; each stays at least 1."""
    return replace(
        budget,
        slots=max(1, budget.slots // 2),
        prefill_tokens=max(1, budget.prefill_tokens // 2),
        vision_tiles=max(1, budget.vision_tiles // 2),
    )


def describe_budget(config: OvisConfig, dtype: torch.dtype, budget: Budget, passes: torch.dtype | None = None) -> str:
    """Describe a budget in one line for the log."""
    kv_gb = budget.kv_tokens * compute_bytes_per_token(config.language, dtype) / 1e9
    passes_gb = bound_transient_bytes(config, dtype, budget, passes) / 1e9
    return (
        f"up to {budget.slots} sequences at once in {kv_gb:.2f} GB of keys and values ({budget.kv_tokens} tokens); "
        f"passes of up to {budget.vision_tiles} tiles or {budget.prefill_tokens} prompt tokens, prompts of up to "
        f"{budget.prompt_tokens} tokens, in up to {passes_gb:.2f} GB"
    )


def bound_transient_bytes(
    config: OvisConfig, dtype: torch.dtype, budget: Budget, passes: torch.dtype | None = None
) -> int:
    """Bound the bytes in addition to weights and cache; only one pass runs at a time."""
    passes = passes or dtype
    prompt_tokens = max(budget.prefill_tokens, budget.prompt_tokens)
    return max(
        bound_vision_bytes(config, passes, budget.vision_tiles) + bound_widened_bytes(dtype, passes),
        bound_prefill_bytes(config, passes, prompt_tokens, budget.slots) + bound_widened_bytes(dtype, passes),
        bound_decode_bytes(config, dtype, budget.slots),
    )


def bound_widened_bytes(dtype: torch.dtype, passes: torch.dtype) -> int:
    """Bound the bytes of the part of a weight that `layers.apply_linear` casts to the dtype of the passes."""
    return WIDENED_VALUES * passes.itemsize if passes != dtype else 0


def bound_vision_bytes(config: OvisConfig, dtype: torch.dtype, tiles: int) -> int:
    """Bound the bytes of a pass that encodes so many tiles, with activations of `dtype`."""
    v, size = config.vision, dtype.itemsize
    patch = size * (6 * v.hidden_size + 3 * v.intermediate_size) + 8 * v.hidden_size  # float32 in the norms
    # Bytes of this pass, of two later ones, of tiles sent ahead, and joined; then as integers, and normalized.
    pixels = 3 * v.image_size**2 * (5 + 4 + 3 * size)
    tokens = tiles * v.tokens_per_tile
    head = min(tokens, HEAD_CHUNK_TOKENS) * v.vocab_size * 2 * size
    kept = tokens * size * (v.hidden_size * v.hidden_stride**2 * 2 + config.language.hidden_size * 2)
    return tiles * (v.num_patches * patch + pixels) + head + kept


def bound_prefill_bytes(config: OvisConfig, dtype: torch.dtype, tokens: int, rows: int) -> int:
    """Bound the bytes of a prefill pass with activations of `dtype`.

    `tokens` are prompt tokens including padding; `rows` is the number of sequences.
    """
    t, size = config.language, dtype.itemsize
    token = size * (8 * t.hidden_size + 2 * t.intermediate_size) + 8 * t.hidden_size + 16 * t.head_dim
    return tokens * token + bound_decode_bytes(config, dtype, rows)


def bound_decode_bytes(config: OvisConfig, dtype: torch.dtype, rows: int) -> int:
    """Bound the bytes of a decode step: logits, also in float32, and for sampling float64 noise and a sort."""
    t, size = config.language, dtype.itemsize
    return rows * (t.vocab_size * (size + 56) + size * (8 * t.hidden_size + 4 * t.intermediate_size))


def _read_available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_cgroup_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that a container may still allocate, by version 2 or 1 of Linux control groups."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # missing, or "max"
            continue
    return 1 << 62
