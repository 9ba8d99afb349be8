"""Run the engine over tensor-parallel ranks, and measure an all-reduce between them.

`python -m benchmarks.engine --ranks 2` starts it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from benchmarks.workload import SHAPES, Workload, build_random_model, make_workload, run_engine
from ovis_model.engine.engine import OvisEngine
from ovis_model.network.ovis import Ovis
from ovis_model.network.tensor_parallel import join_ranks
from pipelines.cluster.actor import exit_at_once


def run_ranks(args: argparse.Namespace) -> None:
    """Start `args.ranks` processes, of which rank 0 prints the result."""
    with tempfile.TemporaryDirectory() as directory:
        spawn(_run_rank, (Path(directory) / "meeting_point", args), nprocs=args.ranks)  # type: ignore[no-untyped-call]


def _run_rank(rank: int, meeting_point: Path, args: argparse.Namespace) -> None:
    """Run one of `--ranks`; rank 0 prints the result."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    with join_ranks(rank, args.ranks, meeting_point, lambda: None) as shard:
        model = build_random_model(SHAPES[args.model], torch.device(args.device), getattr(torch, args.dtype), shard)
        workload = make_workload(model.config, args)
        engine = OvisEngine.from_model(model, eos_token_ids=())
        if model.device.type == "cuda":
            engine.warm_up()
        run_engine(engine, Workload(workload.requests[:2], [2, 2]))
        before = engine.stats
        started_s = time.perf_counter()
        run_engine(engine, workload)
        wall_s = time.perf_counter() - started_s
        stats = engine.stats - before
        exchange_us = {f"[{tokens}, hidden_size]": _measure_all_reduce_us(model, tokens) for tokens in (1, 64, 8192)}
    if rank == 0:
        result = {
            "ranks": args.ranks,
            "images_per_s": len(workload.requests) / wall_s,
            "output_tokens_per_s": sum(workload.output_lengths) / wall_s,
            "seconds": {part: getattr(stats, f"{part}_s") for part in ("vision", "prefill", "decode")},
            "weights_gb": sum(p.numel() * p.itemsize for p in model.parameters()) / 1e9,
            "exchange_us": exchange_us,
        }
        print(json.dumps(result))
    exit_at_once()


def _measure_all_reduce_us(model: Ovis, tokens: int, times: int = 20) -> float:
    """Return the microseconds of one all-reduce, of which a forward pass has two per layer.

    With one rank this is the cost of its launch.
    """
    x = torch.zeros(tokens, model.config.language.hidden_size, device=model.device, dtype=model.dtype)
    torch.distributed.all_reduce(x)
    float(x[0, 0])
    started_s = time.perf_counter()
    for _ in range(times):
        torch.distributed.all_reduce(x)
    float(x[0, 0])  # waits for the device
    return (time.perf_counter() - started_s) / times * 1e6
