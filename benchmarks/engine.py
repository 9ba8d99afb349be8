"""Compare the engine with transformers' padded `generate` on the same rows and weights, in alternation.

    python -m benchmarks.engine --model demo
    python -m benchmarks.engine --model 24x128 --rows 96
    python -m benchmarks.engine --model 1B --dtype bfloat16 --rows 8 --image-size 448x448 --output-median 32
    python -m benchmarks.engine --model 34B --device cuda --dtype bfloat16 --ranks 1     (or 2, 4, 8: a GPU each)

`--model` is a checkpoint, or a shape with random weights: 1B 2B 4B 8B 16B 34B, or 24x128. The latter has 24 layers of
width 128, so a step costs everything but arithmetic. Answers have drawn lengths (log-normal) and ignore end-of-text
ids. The ratios compare with transformers at its best batch size of those tried.

`--quantization fp8` stores weights in FP8, which transformers cannot share. `--ranks` runs the engine alone over that
many processes and also measures an all-reduce between them; `--model` must then be a shape.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer import build_peer, run_transformers
from benchmarks.ranks import run_ranks
from benchmarks.roofline import measure_ceilings
from benchmarks.workload import Workload, load_or_build_model, make_workload, run_engine
from ovis_model.engine.calls import Stats
from ovis_model.engine.cost import compute_cost
from ovis_model.engine.decode_step import CudaGraphs, run_eagerly
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.kv_cache import compute_bytes_per_token
from ovis_model.engine.memory_plan import bound_transient_bytes, plan_for_device
from ovis_model.engine.scheduler import Budget
from ovis_model.network.kernels import FP8
from ovis_model.network.ovis import Ovis

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Timing:
    cpu_s: float
    wall_s: float
    outputs: list[list[int]]


def main() -> None:
    args = parse_options(sys.argv[1:])
    if args.ranks:
        run_ranks(args)
    else:
        print_report(measure_engine(args))


def measure_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Run the engine and, by default, transformers in alternation; return the report."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = load_or_build_model(args.model, device, dtype, args.quantization)
    workload = make_workload(model.config, args)
    graphs = _CountedGraphs()
    step_runner = graphs if args.graphs and model.device.type == "cuda" else lambda: run_eagerly
    engine = OvisEngine.from_model(
        model, budget=_plan_budget(model, args.kv_tokens), make_step_runner=step_runner, eos_token_ids=()
    )
    print(engine.describe(), file=sys.stderr)
    sides: dict[str, Callable[[], list[list[int]]]] = {"engine": lambda: run_engine(engine, workload)}
    if args.peer:
        peer = build_peer(model)
        for size in args.peer_batch:
            sides[f"transformers, batch {size}"] = lambda size=size: run_transformers(peer, model, workload, size)  # type: ignore[misc]
    if model.device.type == "cuda":
        engine.warm_up()
    run_engine(engine, Workload(workload.requests[:2], [2, 2]))
    before, num_captured = engine.stats, graphs.num_captured
    rounds, failures = _time_rounds(sides, args.rounds)
    report = summarize_rounds(rounds, model, engine.stats - before, workload)
    planned = engine.backend.core.scheduler.budget  # type: ignore[union-attr]
    return {
        **report,
        "failures": failures,
        "captures_after_warm_up": graphs.num_captured - num_captured,
        "weights_gb": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e9,
        "planned_gb": _count_planned_bytes(model, planned) / 1e9,
    }


class _CountedGraphs:
    """A factory of CUDA graphs that counts their captures, also of caches that are gone."""

    def __init__(self) -> None:
        self.num_captured = 0

    def __call__(self) -> CudaGraphs:
        counted = self

        class Counted(CudaGraphs):
            def _capture(self, run: Callable[[], None]) -> Callable[[], object]:
                counted.num_captured += 1
                return super()._capture(run)

        return Counted()


def _plan_budget(model: Ovis, kv_tokens: int | None) -> Budget:
    """Plan the memory; with `kv_tokens`, limit the cache so that the other side finds memory too."""
    budget = plan_for_device(model.config, model.dtype, model.device, model.shard)
    return replace(budget, kv_tokens=min(budget.kv_tokens, kv_tokens or budget.kv_tokens))


def _count_planned_bytes(model: Ovis, budget: Budget) -> int:
    cache = budget.kv_tokens * compute_bytes_per_token(model.config.language, model.dtype)
    return cache + bound_transient_bytes(model.config, model.dtype, budget, model.pass_dtype)


def _time_rounds(
    sides: dict[str, Callable[[], list[list[int]]]], count: int
) -> tuple[list[dict[str, Timing]], dict[str, str]]:
    """Time the sides in alternation; return the timings, and why a side could not finish."""
    failures: dict[str, str] = {}
    rounds: list[dict[str, Timing]] = [{} for _ in range(count)]
    for timings in rounds:
        for name, side in sides.items():
            try:
                if name not in failures:
                    timings[name] = _time_side(side)
            except torch.OutOfMemoryError as error:
                failures[name] = str(error).splitlines()[0]
                torch.cuda.empty_cache()
    return [{n: t for n, t in timings.items() if n not in failures} for timings in rounds], failures


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="checkpoint or shape (default demo)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--image-size", default="640x480", help="width x height in pixels (default 640x480)")
    parser.add_argument("--max-tiles", type=int, default=9)
    parser.add_argument("--output-median", type=int, default=80, help="tokens (default 80)")
    parser.add_argument("--output-cap", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=0, help="tensor-parallel processes; 1 also starts NCCL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="also run transformers")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[8, 32], help="batch sizes (default 8 32)")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="use CUDA graphs")
    parser.add_argument("--quantization", default="none", choices=("none", "fp8"), help="fp8 needs --no-peer")
    parser.add_argument("--kv-tokens", type=int, help="limit the cache to so many tokens")
    args = parser.parse_args(argv)
    if args.quantization == "fp8" and (args.peer or args.ranks):
        parser.error("--quantization fp8 needs --no-peer and no --ranks")
    return args


def _time_side(side: Callable[[], list[list[int]]]) -> Timing:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    outputs = side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.process_time() - cpu_s, time.perf_counter() - wall_s, outputs)


def summarize_rounds(rounds: list[dict[str, Timing]], model: Ovis, stats: Stats, workload: Workload) -> dict[str, Any]:
    """Return the medians of each side, where the engine's time went, and the floor that no engine can undercut."""
    ours = rounds[0]["engine"].outputs
    sides = {name: _summarize_side([r[name] for r in rounds], ours) for name in rounds[0]}
    wall_s = sum(r["engine"].wall_s for r in rounds) / len(rounds)
    busy_s = {part: getattr(stats, f"{part}_s") / len(rounds) for part in ("vision", "prefill", "decode")}
    seconds = {"preprocess": workload.preprocess_s, **busy_s, "idle": wall_s - sum(busy_s.values())}
    ceilings = measure_ceilings(model.device, model.pass_dtype)
    first, slots = workload.requests[0], max(1, stats.slot_steps // max(1, stats.steps))
    needed = compute_cost(
        model.config,
        model.dtype,
        tiles=len(first.tiles),
        prompt=len(first.input_ids),
        output_lengths=workload.output_lengths,
        slots=slots,
        layer_bytes=1 if any(parameter.dtype == FP8 for parameter in model.parameters()) else None,
    )
    return {
        "sides": sides,
        "ratio": _compute_best_ratio(sides, "cpu_s_per_image"),
        "wall_ratio": _compute_best_ratio(sides, "wall_s_per_image"),
        "seconds": seconds,
        "slots": slots,
        "slot_occupancy": stats.sequence_steps / max(1, stats.slot_steps),
        "peak_memory_gb": _read_peak_memory_gb(model.device),
        "ms_per_tile": stats.vision_s / max(1, stats.tiles) * 1e3,
        "prefill_tokens_per_s": stats.prompt_tokens / max(stats.prefill_s, 1e-9),
        "ms_per_step": stats.decode_s / max(1, stats.steps) * 1e3,
        "rows_per_step": stats.sequence_steps / max(1, stats.steps),
        "tflops_ceiling": ceilings.flops_per_s / 1e12,
        "gb_per_s_ceiling": ceilings.bytes_per_s / 1e9,
        "floor_s": needed.compute_floor_s(ceilings),
        "floor_ratio": wall_s / needed.compute_floor_s(ceilings),
        "flops_share_of_vision_and_prefill": (needed.vision_flops + needed.prefill_flops)
        / (busy_s["vision"] + busy_s["prefill"])
        / ceilings.flops_per_s,
        "bandwidth_share_of_decode": needed.decode_bytes / max(busy_s["decode"], 1e-9) / ceilings.bytes_per_s,
        **_describe_environment(model),
    }


def _summarize_side(timings: Sequence[Timing], ours: list[list[int]]) -> dict[str, float]:
    rows, tokens = len(ours), sum(map(len, ours))
    wall_s = statistics.median(t.wall_s for t in timings)
    return {
        "cpu_s_per_image": statistics.median(t.cpu_s for t in timings) / rows,
        "wall_s_per_image": wall_s / rows,
        "images_per_s": rows / wall_s,
        "output_tokens_per_s": tokens / wall_s,
        "rows": rows,
        "equal_rows": sum(a == b for a, b in zip(ours, timings[0].outputs, strict=True)),
    }


def _compute_best_ratio(sides: dict[str, dict[str, float]], figure: str) -> float | None:
    """Return `figure` of the best transformers side divided by the engine's; None without such a side."""
    theirs = [side[figure] for name, side in sides.items() if name != "engine"]
    return min(theirs) / sides["engine"][figure] if theirs else None


def _read_peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _describe_environment(model: Ovis) -> dict[str, str]:
    """Return the hardware, dtype, torch version and commit of this measurement."""
    cuda = model.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{_read_cpu_name()}, {torch.get_num_threads()} threads"
    return {"hardware": name, "dtype": str(model.dtype), "torch": torch.__version__, "commit": read_commit()}


def read_commit() -> str:
    """Return the commit that is checked out, or "unknown", e.g. in an image without git."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def _read_cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def print_report(result: dict[str, Any]) -> None:
    """Print the report as lines of text, then as JSON."""
    print(f"{result['hardware']}, {result['dtype']}, commit {result['commit']}")
    for name, side in result["sides"].items():
        print(
            f"{name:24} {side['cpu_s_per_image']:8.4f} CPU s/image {side['images_per_s']:8.2f} images/s "
            f"{side['output_tokens_per_s']:8.1f} tokens/s, {side['equal_rows']} rows equal the engine's"
        )
    split = ", ".join(f"{part} {s:.2f} s" for part, s in result["seconds"].items())
    print(f"{split}; slots in use {result['slot_occupancy']:.1%}; peak memory {result['peak_memory_gb']:.1f} GB")
    print(f"floor {result['floor_s']:.2f} s; the engine takes {result['floor_ratio']:.2f} times as long")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
