"""Say how a model fits on a GPU, and estimate its rate there from the GPU's published figures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ovis_model.config import OvisConfig, Quantization
from ovis_model.engine.cost import Ceilings, compute_cost
from ovis_model.engine.memory_plan import divide_into_pages, measure_free_bytes, plan_budget
from ovis_model.engine.scheduler import Budget
from ovis_model.network.tensor_parallel import Shard
from ovis_model.sizing import estimate_weight_bytes, find_min_ranks

# Shares of the published peaks that large models usually reach; nothing of this project was measured on these GPUs.
_FLOPS_SHARE, _BANDWIDTH_SHARE = 0.35, 0.5
_USABLE = 0.97  # of the memory: the rest is taken by CUDA's context and libraries


@dataclass(frozen=True)
class Gpu:
    """A GPU by its published figures: memory, dense bfloat16 arithmetic, memory bandwidth, compute capability."""

    memory_gb: float
    tflops: float
    tb_per_s: float
    capability: tuple[int, int]


GPUS = {
    "a100-40": Gpu(40, 312, 1.56, (8, 0)),
    "a100-80": Gpu(80, 312, 2.04, (8, 0)),
    "h100-80": Gpu(80, 989, 3.35, (9, 0)),
    "h200-141": Gpu(141, 989, 4.8, (9, 0)),
    "l4-24": Gpu(24, 121, 0.3, (8, 9)),
    "l40s-48": Gpu(48, 362, 0.86, (8, 9)),
}
"""{name: GPU}; data sheets of NVIDIA, without sparsity."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one device of a replica: how much the weights take, and what runs at once in the rest."""

    ranks: int
    weight_gb: float
    cache_tokens: int
    sequences: int
    tiles_at_once: int
    prompt_tokens_at_once: int


@dataclass(frozen=True)
class EngineEstimate:
    """Rows per second of one replica, computed and not measured, and from which figures."""

    rows_per_s: float
    figures: str


def choose_ranks(config: OvisConfig, gpu: Gpu, quantization: Quantization) -> int:
    """Return the fewest GPUs for a replica. Raise ValueError if none is enough."""
    return find_min_ranks(config, int(gpu.memory_gb * 1e9), 2, quantization)


def plan_gpu_memory(config: OvisConfig, gpu: Gpu, ranks: int, quantization: Quantization) -> MemoryPlan:
    """Plan the memory of one of `ranks` GPUs. Raise ValueError if the model does not fit."""
    weight_bytes = estimate_weight_bytes(config, ranks, 2, quantization)
    local = replace(config, language=Shard(size=ranks).to_local(config.language))
    budget = plan_budget(local, torch.bfloat16, int(gpu.memory_gb * 1e9 * _USABLE) - weight_bytes)
    return _describe(ranks, weight_bytes, divide_into_pages(budget))


def plan_cpu_memory(config: OvisConfig, dtype: str) -> MemoryPlan:
    """Plan the memory of a replica on this machine's CPUs, as it is free now. Raise ValueError if it does not fit."""
    values = getattr(torch, dtype)
    weight_bytes = estimate_weight_bytes(config, 1, values.itemsize, "none")
    free_bytes = measure_free_bytes(torch.device("cpu")) - weight_bytes
    return _describe(1, weight_bytes, plan_budget(config, values, free_bytes))


def _describe(ranks: int, weight_bytes: int, budget: Budget) -> MemoryPlan:
    return MemoryPlan(
        ranks,
        round(weight_bytes / 1e9, 3),
        budget.kv_tokens,
        budget.slots,
        budget.vision_tiles,
        max(budget.prefill_tokens, budget.prompt_tokens),
    )


def estimate_rate(
    config: OvisConfig, gpu: Gpu, memory: MemoryPlan, *, tiles: float, prompt: float, output: float
) -> EngineEstimate:
    """Estimate the rate of a replica for rows of `tiles` tiles, `prompt` tokens with images, and `output` tokens."""
    per_sequence = prompt + output
    slots = max(1, min(memory.sequences, int(memory.cache_tokens / per_sequence)))
    rows = 8 * slots
    cost = compute_cost(
        config,
        torch.bfloat16,
        tiles=max(1, round(tiles)),
        prompt=round(prompt),
        output_lengths=[max(1, round(output))] * rows,
        slots=slots,
    )
    ceilings = Ceilings(
        gpu.tflops * 1e12 * _FLOPS_SHARE * memory.ranks, gpu.tb_per_s * 1e12 * _BANDWIDTH_SHARE * memory.ranks
    )
    peaks = f"{100 * _FLOPS_SHARE:.0f} % of {gpu.tflops:g} TFLOPS and {100 * _BANDWIDTH_SHARE:.0f} % of"
    work = f"{slots} rows at once of {tiles:.1f} tiles, {prompt:.0f} prompt and {output:.0f} output tokens"
    return EngineEstimate(
        rows / cost.compute_floor_s(ceilings), f"{peaks} {gpu.tb_per_s:g} TB/s on each of {memory.ranks} GPUs, {work}"
    )
