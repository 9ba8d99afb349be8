"""Accept the engine on one GPU: measure it, and compare the figures with thresholds.

    python -m benchmarks.gpu_acceptance --minutes 8 --part 1      kernels, memory, tests marked gpu
    python -m benchmarks.gpu_acceptance --minutes 8 --part 2      the engine: 1B and 8B, graphs on and off
    python -m benchmarks.gpu_acceptance --minutes 8 --part 3      transformers, 34B, two minutes of mixed rows
    python -m benchmarks.gpu_acceptance --part 1 --tiny --device cpu       the same lines in seconds, to test them

It needs torch, numpy, Pillow, tokenizers and safetensors, transformers for part 3, pytest and hypothesis for the tests;
neither Ray nor flash-attn nor llguidance. Each line runs in a process of its own, so a fault of the device or of one
line leaves the others. A line is "ok" or "failed" with its reason; its verdict is "pass", or what misses its
threshold. The last line is JSON. The exit code is 0 if all lines pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from benchmarks import gpu_measurements as gpu
from benchmarks.engine import ROOT
from benchmarks.gpu_measurements import Figures, Setting

MIN_LEFT_S = 20.0
"""A line that has less time is skipped; it would not get beyond loading."""


@dataclass(frozen=True)
class Threshold:
    """A figure of a line, and its least or greatest value."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def find_fault(self, figures: Figures) -> str | None:
        """Return what misses the threshold, or None."""
        value = figures.get(self.figure)
        if value is None:
            return f"{self.figure} is missing"
        if self.at_least is not None and not value >= self.at_least:
            return f"{self.figure} {value:.3g} < {self.at_least:g}"
        if self.at_most is not None and not value <= self.at_most:
            return f"{self.figure} {value:.3g} > {self.at_most:g}"
        return None


@dataclass(frozen=True)
class Line:
    """One measurement with its thresholds; skipped on cards with less than `min_memory_gb`."""

    name: str
    part: int
    measure: Callable[[Setting], Figures]
    thresholds: tuple[Threshold, ...] = ()
    min_memory_gb: float = 0.0


@dataclass
class Result:
    """What became of a line: `status` is ok, failed or skipped."""

    name: str
    status: str
    reason: str = ""
    faults: list[str] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Pass, skipped, or what is wrong."""
        if self.status != "ok":
            return f"{self.status}: {self.reason}"
        return "; ".join(self.faults) or "pass"


def _time_engine(size: str, rows: int, options: str) -> Callable[[Setting], Figures]:
    return partial(gpu.run_engine, size=size, rows=rows, options=options)


ALONE = "--no-peer --rounds 2"
PEER = "--peer-batch 4 8 --rounds 1 --kv-tokens 110592"  # 36 rows of 10 tiles, so that transformers has the rest
NO_CAPTURE = Threshold("captures_after_warm_up", at_most=0)
MEMORY = Threshold("spare_gb", at_least=3)

LINES = (
    Line("device", 1, gpu.describe_device),
    Line("free memory after loading 8B", 1, gpu.measure_memory, (Threshold("lost_gb", at_most=2),)),
    Line("visual head", 1, gpu.measure_head),
    Line("norms", 1, gpu.measure_norms),
    Line("attention at new lengths", 1, gpu.measure_new_shapes, (Threshold("first ms, without cuDNN", at_most=50),)),
    Line("uploads", 1, gpu.measure_uploads),
    Line("tests with varlen", 1, partial(gpu.run_tests, attention="varlen")),
    Line("tests with sdpa", 1, partial(gpu.run_tests, attention="sdpa")),
    Line(
        "1B",
        2,
        _time_engine("1B", 256, ALONE),
        (
            Threshold("images_per_s", at_least=20),
            Threshold("flops_share_of_vision_and_prefill", at_least=0.5),
            Threshold("ms_per_tile", at_most=3.3),
            NO_CAPTURE,
            MEMORY,
        ),
    ),
    Line(
        "8B",
        2,
        _time_engine("8B", 128, ALONE),
        (
            Threshold("images_per_s", at_least=5.5),
            Threshold("flops_share_of_vision_and_prefill", at_least=0.5),
            Threshold("bandwidth_share_of_decode", at_least=0.7),
            NO_CAPTURE,
            MEMORY,
        ),
    ),
    Line("1B without graphs", 2, _time_engine("1B", 256, f"{ALONE} --no-graphs")),
    Line("8B in FP8", 2, _time_engine("8B", 128, f"{ALONE} --quantization fp8"), (NO_CAPTURE, MEMORY)),
    Line("1B in FP8", 2, _time_engine("1B", 256, f"{ALONE} --quantization fp8"), (NO_CAPTURE, MEMORY)),
    Line(
        "1B and transformers",
        3,
        _time_engine("1B", 32, PEER),
        (Threshold("times_transformers", at_least=5), Threshold("equal_rows", at_least=0.9)),
    ),
    Line(
        "8B and transformers",
        3,
        _time_engine("8B", 32, PEER),
        (Threshold("times_transformers", at_least=3), Threshold("equal_rows", at_least=0.9)),
    ),
    Line("soak", 3, partial(gpu.run_soak, size="1B")),
    Line(
        "34B",
        3,
        _time_engine("34B", 64, "--no-peer --rounds 1"),
        (Threshold("images_per_s", at_least=1.2), NO_CAPTURE),
        min_memory_gb=130,
    ),
    Line(
        "34B in FP8",
        3,
        _time_engine("34B", 64, "--no-peer --rounds 1 --quantization fp8"),
        (NO_CAPTURE, MEMORY),
        min_memory_gb=75,
    ),
)


def main() -> int:
    """Run the lines of a part; return the exit code."""
    args = _parse()
    ends_s = time.monotonic() + 60 * args.minutes
    if args.line:
        print(json.dumps(_measure(_find_line(args.line), args, args.minutes * 60)))
        return 0
    results = []
    for line in _list_lines(args.part, args.only):
        result = _run(line, args, ends_s - time.monotonic())
        results.append(result)
        print(f"{line.name}: {result.verdict}  {_format_figures(result.figures)}", flush=True)
    results += _compare(results)
    print("\n".join(format_table(results)))
    ran = [result.verdict for result in results if result.status != "skipped"]
    passed = bool(ran) and set(ran) == {"pass"}
    lines = [asdict(result) | {"verdict": result.verdict} for result in results]
    print(json.dumps({"part": args.part, "passed": passed, "lines": lines}))
    return 0 if passed else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for all lines (default 8)")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to test this command")
    parser.add_argument("--only", nargs="+", metavar="LINE", help="only lines of these names, of any part")
    parser.add_argument("--line", help="measure one line in this process and print its figures as JSON")
    parser.add_argument("--in-process", action="store_true", help="run all lines in this process, to test this command")
    return parser.parse_args()


def _list_lines(part: int, names: list[str] | None) -> list[Line]:
    return [line for line in LINES if (line.name in names if names else line.part == part)]


def _find_line(name: str) -> Line:
    return next(line for line in LINES if line.name == name)


def _measure(line: Line, args: argparse.Namespace, left_s: float) -> Figures:
    seconds = 0.0 if args.tiny else min(120.0, left_s / 2)
    figures = line.measure(gpu.parse_setting(args, seconds))
    if "peak_memory_gb" in figures:
        figures["spare_gb"] = figures["planned_gb"] + figures["weights_gb"] - figures["peak_memory_gb"]
    return figures


def _run(line: Line, args: argparse.Namespace, left_s: float) -> Result:
    """Run a line whatever happens in it, and compare its figures with its thresholds."""
    if left_s < MIN_LEFT_S:
        return Result(line.name, "skipped", "the time is used up")
    if line.min_memory_gb and _read_memory_gb(args.device) < line.min_memory_gb:
        return Result(line.name, "skipped", f"needs a GPU of {line.min_memory_gb:.0f} GB")
    try:
        figures = _measure(line, args, left_s) if args.in_process else _measure_apart(line, args, left_s)
    except Exception as error:  # the other lines must run
        return Result(line.name, "failed", _shorten(error))
    faults = [fault for threshold in line.thresholds if (fault := threshold.find_fault(figures))]
    return Result(line.name, "ok", faults=faults, figures=figures)


def _shorten(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:300]


def _measure_apart(line: Line, args: argparse.Namespace, left_s: float) -> Figures:
    """Run the line in a process of its own. Raise RuntimeError with the last line that it printed."""
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--line", line.name, "--device", args.device]
    command += ["--minutes", str(left_s / 60), *["--tiny"] * args.tiny]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"stopped after {left_s:.0f} s") from error
    if run.returncode:
        printed = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        raise RuntimeError(printed[-1])
    figures: Figures = json.loads(run.stdout.splitlines()[-1])
    return figures


def _read_memory_gb(device: str) -> float:
    import torch

    is_cuda = device == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(0).total_memory / 1e9 if is_cuda else 0.0


@dataclass(frozen=True)
class Comparison:
    """A figure of one line, divided by that of another, and the least ratio."""

    name: str
    figure: str
    line: str
    other: str
    at_least: float


COMPARISONS = (
    Comparison("graphs", "decode_s", "1B without graphs", "1B", 2),
    Comparison("FP8 on 8B", "images_per_s", "8B in FP8", "8B", 1.1),
    Comparison("FP8 on 34B", "images_per_s", "34B in FP8", "34B", 1.1),
)


def _compare(results: list[Result]) -> Iterator[Result]:
    """Yield the comparisons whose lines have run."""
    figures = {result.name: result.figures for result in results if result.status == "ok"}
    for each in COMPARISONS:
        if {each.line, each.other} <= set(figures):
            name = f"{each.figure}, {each.line} / {each.other}"
            found = {name: figures[each.line][each.figure] / figures[each.other][each.figure]}
            fault = Threshold(name, at_least=each.at_least).find_fault(found)
            yield Result(each.name, "ok", faults=[fault] if fault else [], figures=found)


COLUMNS: dict[str, str] = {
    "images/s": "images_per_s",
    "ms a tile": "ms_per_tile",
    "prefill tokens/s": "prefill_tokens_per_s",
    "ms a step": "ms_per_step",
    "rows a step": "rows_per_step",
    "FLOP share of vision and prefill": "flops_share_of_vision_and_prefill",
    "bandwidth share": "bandwidth_share_of_decode",
    "captures after warm-up": "captures_after_warm_up",
    "weights + planned GB": "planned_total_gb",
    "peak GB": "peak_memory_gb",
    "times transformers": "times_transformers",
}


def format_table(results: list[Result]) -> list[str]:
    """Format the results as a Markdown table; figures without a column stand with the verdict."""
    lines = [f"| line | {' | '.join(COLUMNS)} | verdict |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for result in results:
        figures = dict(result.figures)
        if "planned_gb" in figures:
            figures["planned_total_gb"] = figures["planned_gb"] + figures["weights_gb"]
        cells = [_format_value(figures.get(figure)) for figure in COLUMNS.values()]
        lines.append(f"| {result.name} | {' | '.join(cells)} | {result.verdict} |")
    return lines


def _format_figures(figures: Figures) -> str:
    return ", ".join(f"{name} {_format_value(value)}" for name, value in figures.items())


def _format_value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
