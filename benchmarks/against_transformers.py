"""Print all figures of the engine in one call, as a table with hardware and commit.

    python -m benchmarks.against_transformers cpu     small models and transformers, float32 (about 10 minutes)
    python -m benchmarks.against_transformers 1B      Ovis2-1B's shape in bfloat16 on a CPU (an hour)
    python -m benchmarks.against_transformers gpu     1B and 8B on CUDA: graphs on and off, kernels (under 10 minutes)
    python -m benchmarks.against_transformers tiny    the runs of `gpu`, tiny and on a CPU, to test this script

Each line of the table is a run of `benchmarks.engine` in a separate process. The last line is JSON with all results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from tests.support.roots import ROOT

TIME_LIMIT_S = 570
"""Limit of all runs on a GPU together; runs that would start after it are skipped."""


@dataclass(frozen=True)
class EngineRun:
    name: str
    options: str
    attention: str = ""


MIXED = "--output-median 40 --output-cap 128"
CPU = [
    EngineRun("demo, 3 tiles", f"--model demo --image-size 168x126 --rows 512 --peer-batch 32 64 {MIXED}"),
    EngineRun(
        "tiny112, 3 tiles",
        f"--model tests/golden/tiny112-untied/aidc --image-size 168x126 --rows 512 --peer-batch 32 64 {MIXED}",
    ),
    EngineRun("24 layers of width 128", f"--model 24x128 --image-size 112x112 --rows 256 --peer-batch 32 64 {MIXED}"),
]
ONE_B = [
    EngineRun(
        "Ovis2-1B shape, 1 tile",
        "--model 1B --dtype bfloat16 --rows 8 --image-size 448x448 --output-median 32 --output-cap 64 --peer-batch 4 8",
    )
]


def list_gpu_runs(
    device: str, models: dict[str, int], sizes: tuple[str, ...], dtype: str, extra: str
) -> list[EngineRun]:
    """List the most informative runs first: compared with transformers, then without graphs, then by kernel."""
    base = f"--device {device} --dtype {dtype} {extra}"
    compared = [
        EngineRun(
            f"{model}, {size}",
            f"--model {model} --image-size {size} --rows {rows} --peer-batch 16 64 --rounds 1 {base}",
        )
        for model, rows in models.items()
        for size in sizes
    ]
    alone = f"--no-peer --rounds 1 --image-size {sizes[0]} {base}"
    without_graphs = [
        EngineRun(f"{model}, {sizes[0]}, no graphs", f"--model {model} --rows {rows} --no-graphs {alone}")
        for model, rows in models.items()
    ]
    by_kernel = [
        EngineRun(f"{model}, {sizes[0]}, {name}", f"--model {model} --rows {rows} {alone}", name)
        for model, rows in models.items()
        for name in ("flash", "varlen", "sdpa")
    ]
    return [*compared, *without_graphs, *by_kernel]


SUITES = {
    "cpu": CPU,
    "1B": ONE_B,
    "gpu": list_gpu_runs("cuda", {"1B": 256, "8B": 128}, ("640x480", "1920x1080"), "bfloat16", ""),
    "tiny": list_gpu_runs("cpu", {"24x128": 8}, ("112x112", "224x112"), "float32", "--output-median 5 --output-cap 9"),
}


def main() -> None:
    suite = sys.argv[1] if len(sys.argv) == 2 and sys.argv[1] in SUITES else sys.exit(__doc__)
    started_s, results = time.monotonic(), {}
    for run in SUITES[suite]:
        left_s = TIME_LIMIT_S - (time.monotonic() - started_s)
        results[run.name] = run_engine_benchmark(run, left_s if suite == "gpu" else None)
        print(format_line(run.name, results[run.name]), file=sys.stderr, flush=True)
    print(format_table(results))
    print(json.dumps(results))


def run_engine_benchmark(run: EngineRun, limit_s: float | None) -> dict[str, Any]:
    """Return the JSON of the run, or {"error": reason}, so that one failing run does not stop the others."""
    command = [sys.executable, "-m", "benchmarks.engine", *run.options.split()]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OVIS_ATTENTION": run.attention}
    if not run.attention:
        del environment["OVIS_ATTENTION"]
    if limit_s is not None and limit_s < 1:
        return {"error": "skipped, the time limit is used up"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit_s:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results as a Markdown table below a line with hardware and commit."""
    measured = [result for result in results.values() if "error" not in result]
    environments = {f"{r['hardware']}, torch {r['torch']}, commit {r['commit']}" for r in measured}
    head = ["| run | images/s | tokens/s | CPU s/image | transformers, best batch | ratio | floor | slots in use |"]
    lines = [format_line(name, result) for name, result in results.items()]
    return "\n".join([*sorted(environments), "", *head, "|---|---|---|---|---|---|---|---|", *lines])


def format_line(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {name} | {result['error']} | | | | | | |"
    ours, ratio = result["sides"]["engine"], result["wall_ratio" if "NVIDIA" in result["hardware"] else "ratio"]
    theirs = [side["cpu_s_per_image"] for name, side in result["sides"].items() if name != "engine"]
    best, times = (f"{min(theirs):.4f}", f"{ratio:.2f}") if theirs else ("-", "-")
    return (
        f"| {name} | {ours['images_per_s']:.2f} | {ours['output_tokens_per_s']:.0f} | {ours['cpu_s_per_image']:.4f} "
        f"| {best} | {times} | {result['floor_ratio']:.2f} x | {result['slot_occupancy']:.0%} |"
    )


if __name__ == "__main__":
    main()
