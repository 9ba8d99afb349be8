"""Plan what a device may hold at once, from its free memory and the sizes of the model.

A pass allocates what its formula below says or less, so a plan holds by construction; `tests/test_memory.py` counts the
allocations of all published sizes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ovis_model.config import OvisConfig
from ovis_model.engine.kv_cache import compute_bytes_per_token
from ovis_model.engine.scheduler import Budget
from ovis_model.network.layers import WIDENED_VALUES, choose_pass_dtype
from ovis_model.network.tensor_parallel import Shard
from ovis_model.network.vision import HEAD_CHUNK_TOKENS

_MAX_BUDGET = Budget(kv_tokens=0)
_MIN_KV_TOKENS = 1024
"""One tile, a question and an answer: with less there is no point in starting."""


def measure_free_bytes(device: torch.device) -> int:
    """On CUDA what is free now; on a CPU half of it, because rows are prepared and written there too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_read_available_bytes(), _read_cgroup_bytes()) // 2


def plan_for_device(config: OvisConfig, dtype: torch.dtype, device: torch.device, shard: Shard) -> Budget:
    """`plan` over what is free now, the same for all ranks of a model, which on a CPU share its memory.

    On CUDA all of the cache is taken at once; a CPU's grows with the rows.
    """
    is_cuda = device.type == "cuda"
    free = shard.reduce_min(measure_free_bytes(device) // (1 if is_cuda else shard.size))
    budget = plan_budget(
        replace(config, language=shard.to_local(config.language)), dtype, free, choose_pass_dtype(dtype, device)
    )
    return replace(budget, slot_tokens=budget.kv_tokens // budget.slots) if is_cuda else budget


def plan_budget(config: OvisConfig, dtype: torch.dtype, free: int, passes: torch.dtype | None = None) -> Budget:
    """The largest budget that fits in `free` bytes, of which a tenth stays unused: memory is handed out in pieces.

    Passes get up to a third, keys and values the rest. `passes`: the type of their activations, if it is not `dtype`;
    see `layers.pass_dtype`. Raises ValueError if not even a short row fits.
    """
    usable, budget = free * 9 // 10, replace(_MAX_BUDGET, prompt_tokens=config.max_length)
    while bound_transient_bytes(config, dtype, budget, passes) > usable // 3 and budget.prompt_tokens > 1:
        budget = replace(halve(budget), prompt_tokens=budget.prompt_tokens // 2)
    fit = (usable - bound_transient_bytes(config, dtype, budget, passes)) // compute_bytes_per_token(
        config.language, dtype
    )
    if fit < _MIN_KV_TOKENS:
        raise ValueError(
            f"{free / 1e9:.1f} GB are free beside the weights, too little to generate: free the device, take a larger "
            "one, or load the model in bfloat16"
        )
    return replace(budget, kv_tokens=min(fit, budget.slots * config.max_length))


def halve(budget: Budget) -> Budget:
    """Half of the rows, tokens and tiles that go together, at least one."""
    return replace(
        budget,
        slots=max(1, budget.slots // 2),
        prefill_tokens=max(1, budget.prefill_tokens // 2),
        vision_tiles=max(1, budget.vision_tiles // 2),
    )


def describe_budget(config: OvisConfig, dtype: torch.dtype, budget: Budget, passes: torch.dtype | None = None) -> str:
    """One line for the log."""
    kv_gb = budget.kv_tokens * compute_bytes_per_token(config.language, dtype) / 1e9
    passes_gb = bound_transient_bytes(config, dtype, budget, passes) / 1e9
    return (
        f"{budget.slots} rows side by side in {kv_gb:.2f} GB of keys and values ({budget.kv_tokens} tokens); passes of "
        f"{budget.vision_tiles} tiles and {budget.prefill_tokens} prompt tokens, prompts of {budget.prompt_tokens}, "
        f"in up to {passes_gb:.2f} GB"
    )


def bound_transient_bytes(
    config: OvisConfig, dtype: torch.dtype, budget: Budget, passes: torch.dtype | None = None
) -> int:
    """Beside weights and cache; only one pass runs at a time."""
    passes = passes or dtype
    prompt_tokens = max(budget.prefill_tokens, budget.prompt_tokens)
    return max(
        bound_vision_bytes(config, passes, budget.vision_tiles) + bound_widened_bytes(dtype, passes),
        bound_prefill_bytes(config, passes, prompt_tokens, budget.slots) + bound_widened_bytes(dtype, passes),
        bound_decode_bytes(config, dtype, budget.slots),
    )


def bound_widened_bytes(dtype: torch.dtype, passes: torch.dtype) -> int:
    """Of the part of a weight that `layers.linear` has in the type of the passes."""
    return WIDENED_VALUES * passes.itemsize if passes != dtype else 0


def bound_vision_bytes(config: OvisConfig, dtype: torch.dtype, tiles: int) -> int:
    """Of encoding so many tiles in one pass, with activations of `dtype`."""
    v, size = config.vision, dtype.itemsize
    patch = size * (6 * v.hidden_size + 3 * v.intermediate_size) + 8 * v.hidden_size  # float32 in the norms
    pixels = 3 * v.image_size**2 * (1 + 4 + 3 * size)
    tokens = tiles * v.tokens_per_tile
    head = min(tokens, HEAD_CHUNK_TOKENS) * v.vocab_size * 2 * size
    kept = tokens * size * (v.hidden_size * v.hidden_stride**2 * 2 + config.language.hidden_size * 2)
    return tiles * (v.num_patches * patch + pixels) + head + kept


def bound_prefill_bytes(config: OvisConfig, dtype: torch.dtype, tokens: int, rows: int) -> int:
    """Of so many prompt tokens, padding included, of so many rows in one pass, with activations of `dtype`."""
    t, size = config.language, dtype.itemsize
    token = size * (8 * t.hidden_size + 2 * t.intermediate_size) + 8 * t.hidden_size + 16 * t.head_dim
    return tokens * token + bound_decode_bytes(config, dtype, rows)


def bound_decode_bytes(config: OvisConfig, dtype: torch.dtype, rows: int) -> int:
    """Of the logits; float32 and, for sampled rows, noise in float64 and a sort are made of them."""
    t, size = config.language, dtype.itemsize
    return rows * (t.vocab_size * (size + 56) + size * (8 * t.hidden_size + 4 * t.intermediate_size))


def _read_available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_cgroup_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container may still take, by version 2 or 1 of Linux' control groups."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return 1 << 62
