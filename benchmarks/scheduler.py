"""Simulate how the scheduler fills the cache of a GPU: real queue and memory plan, no model and no device.

    python -m benchmarks.scheduler [--rows 4000] [--memory-gb 80]
    python -m benchmarks.scheduler --plans [--quantization fp8]

Each line is a mix of requests on one model, with a cache in pages and in slots of one capacity; "one by one" admits
each short prompt at once. "Passes" are those over prompts. "x uniform" compares
the steps with those of as many requests of one length and as many tokens in total; the first lines are those requests
themselves. `--plans` prints the memory plan of all sizes on usual GPUs instead. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ovis_model.config import SIZES, Quantization
from ovis_model.engine.kv_cache import compute_bytes_per_token
from ovis_model.engine.memory_plan import (
    MIN_PREFILL_TOKENS,
    bound_transient_bytes,
    divide_into_pages,
    fix_slots,
    plan_budget,
)
from ovis_model.engine.requests import RequestState, make_states
from ovis_model.engine.scheduler import Budget, Scheduler, pack_into_passes
from ovis_model.network.tensor_parallel import Shard
from ovis_model.sizing import count_language_parameters, count_vision_parameters, estimate_device_bytes
from ovis_model.types import Request, SamplingParams

CONTEXT_BYTES = 700_000_000
"""What CUDA, its libraries and NCCL allocate before the memory is planned; an estimate."""
PROMPT, MAX_NEW_TOKENS, MEDIAN_NEW_TOKENS = 2680, 256, 80
MODELS = (("1B", 1), ("8B", 1), ("34B", 2))

Prompts = NDArray[np.int64]
Draw = Callable[[np.random.Generator, int], Prompts]


@dataclass(frozen=True)
class Outcome:
    """Steps until all requests were done, passes over prompts, and the mean number of sequences in a step."""

    steps: int
    passes: int
    rows_per_step: float
    slots: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--memory-gb", type=float, default=80)
    parser.add_argument("--plans", action="store_true", help="print the memory plans of all sizes")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none", help="of the weights in the plans")
    args = parser.parse_args()
    results = list(list_plans(args.quantization)) if args.plans else list(simulate_all(args.rows, args.memory_gb))
    for line in format_table(results):
        print(line)
    print(json.dumps(results))


def format_table(results: list[dict[str, Any]]) -> list[str]:
    """Format dictionaries of equal keys as the lines of a Markdown table."""
    rows = [list(results[0]), ["---"] * len(results[0]), *(list(map(str, result.values())) for result in results)]
    return [f"| {' | '.join(row)} |" for row in rows]


def plan_memory(size: str, ranks: int, memory_gb: float, quantization: Quantization = "none") -> Budget:
    """Plan a published size in bfloat16 on GPUs of `memory_gb` (1e9 bytes). Raise ValueError if it does not fit."""
    config = SIZES[size]
    weights = (count_vision_parameters(config) + count_language_parameters(config.language) / ranks) * 2
    weights -= estimate_device_bytes(config, ranks, 2) - estimate_device_bytes(config, ranks, 2, quantization)
    local = replace(config, language=Shard(0, ranks).to_local(config.language))
    budget = plan_budget(local, torch.bfloat16, max(0, int(memory_gb * 1e9 - weights - CONTEXT_BYTES)))
    return replace(budget, min_prefill_tokens=MIN_PREFILL_TOKENS)


def list_plans(quantization: Quantization = "none") -> Iterator[dict[str, Any]]:
    """Yield the plan of each size on each GPU, in pages."""
    for size, config in SIZES.items():
        for ranks, memory_gb in ((1, 24), (1, 48), (1, 80), (1, 141), (2, 24), (2, 48), (2, 80)):
            try:
                budget = divide_into_pages(plan_memory(size, ranks, memory_gb, quantization))
            except ValueError:
                continue
            local = replace(config, language=Shard(0, ranks).to_local(config.language))
            bytes_per_token = compute_bytes_per_token(local.language, torch.bfloat16)
            images = budget.kv_tokens // (-(-(PROMPT + MAX_NEW_TOKENS) // budget.page_tokens) * budget.page_tokens)
            yield {
                "size": size,
                "GPUs": f"{ranks} x {memory_gb} GB",
                "cache GB": round(budget.kv_tokens * bytes_per_token / 1e9, 1),
                "tokens": budget.kv_tokens,
                "images at once": min(budget.slots, images),
                "passes GB": round(bound_transient_bytes(local, torch.bfloat16, budget) / 1e9, 1),
                "tiles a pass": budget.vision_tiles,
                "longest prompt": budget.prompt_tokens,
            }


def draw_uniform(rng: np.random.Generator, count: int) -> Prompts:
    return np.full(count, PROMPT)


def draw_mixed(rng: np.random.Generator, count: int) -> Prompts:
    """Draw images of one to ten tiles."""
    return 120 + 256 * rng.integers(1, 11, count)


def draw_one_percent_long(rng: np.random.Generator, count: int) -> Prompts:
    return np.where(rng.random(count) < 0.01, 9000, PROMPT)


def draw_one_very_long(rng: np.random.Generator, count: int) -> Prompts:
    prompts = np.full(count, PROMPT)
    prompts[count // 3] = 16_000
    return prompts


def draw_videos(rng: np.random.Generator, count: int) -> Prompts:
    """Draw images, and one video of 32 frames among 50 of them."""
    return np.where(rng.random(count) < 0.02, 120 + 256 * 32, PROMPT)


def draw_small(rng: np.random.Generator, count: int) -> Prompts:
    """Draw images of one tile."""
    return np.full(count, 293)


CASES: dict[str, Draw] = {
    "uniform": draw_uniform,
    "1 tile each": draw_small,
    "1 to 10 tiles": draw_mixed,
    "1 % of 9,000 tokens": draw_one_percent_long,
    "one of 16,000 tokens": draw_one_very_long,
    "2 % videos of 32 frames": draw_videos,
}


def simulate_all(rows: int, memory_gb: float) -> Iterator[dict[str, Any]]:
    """Yield the outcome of each case on each model."""
    for size, ranks in MODELS:
        plan = plan_memory(size, ranks, memory_gb)
        for name, draw in CASES.items():
            prompts = draw(np.random.default_rng(0), rows)
            pages, slots = divide_into_pages(plan), fix_slots(SIZES[size], plan)
            each = replace(pages, min_prefill_tokens=0)
            for kind, budget in {"pages": pages, "pages, one by one": each, "slots": slots}.items():
                yield {
                    "model": f"{size} TP{ranks}",
                    "case": name,
                    "cache": kind,
                    **compare_with_uniform(budget, prompts),
                }


def compare_with_uniform(budget: Budget, prompts: Prompts) -> dict[str, Any]:
    """Return what a case takes, and how much more than requests of one length with as many tokens."""
    outcome = simulate(budget, prompts)
    uniform = simulate(budget, np.full(len(prompts), round(float(prompts.mean()))))
    return {
        "steps": outcome.steps,
        "passes": outcome.passes,
        "rows a step": round(outcome.rows_per_step, 1),
        "x uniform": round(outcome.steps / uniform.steps, 3),
    }


def simulate(budget: Budget, prompts: Prompts) -> Outcome:
    """Run requests with these prompt lengths through a scheduler; 256 to 320 of them wait at any time."""
    scheduler, rng = Scheduler(budget), np.random.default_rng(1)
    lengths = np.exp(rng.normal(math.log(MEDIAN_NEW_TOKENS), 0.6, len(prompts))).clip(1, MAX_NEW_TOKENS).astype(int)
    left = iter(list(zip(prompts.tolist(), lengths.tolist(), strict=True)))
    wanted: dict[RequestState, int] = {}
    steps = passes = sequence_steps = 0
    while _feed(scheduler, left, wanted) or scheduler.waiting or scheduler.running:
        admitted = scheduler.admit()
        scheduler.retire()
        if not admitted and scheduler.plan_cache():
            continue
        whole, _ = scheduler.split_prompts(admitted)
        passes += sum(1 for _ in pack_into_passes(whole, budget.prefill_tokens))
        for state in scheduler.running:
            state.append(0, 0.0)
            if len(state.output_ids) >= wanted[state]:
                state.finish_reason = "stop"
        steps += bool(scheduler.running)
        sequence_steps += len(scheduler.running)
    return Outcome(steps, passes, sequence_steps / steps, scheduler.slots)


def _feed(scheduler: Scheduler, left: Iterator[tuple[int, int]], wanted: dict[RequestState, int]) -> bool:
    """Enqueue up to 64 requests if fewer than 256 wait; return whether there were any."""
    if len(scheduler.waiting) >= 256:
        return False
    batch = [pair for pair, _ in zip(left, range(64), strict=False)]
    tiles, sizes = np.zeros((0, 3, 1, 1), np.uint8), np.zeros((0, 2), np.int32)
    requests = [Request(np.zeros(prompt, np.int32), tiles, sizes) for prompt, _ in batch]
    states = make_states(requests, [SamplingParams(max_new_tokens=MAX_NEW_TOKENS)] * len(batch))
    wanted.update((state, length) for state, (_, length) in zip(states, batch, strict=True))
    scheduler.enqueue(states)
    return bool(batch)


if __name__ == "__main__":
    main()
