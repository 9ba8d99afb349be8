"""Measure what a decode step costs beyond its kernels.

    python -m benchmarks.decode [--model 24x128] [--rows 1 8 32]

Three ways to run a step over the same rows alternate: by the engine, including its work around the model; by the
decoder alone; and as a recording of the same operators (`torch.jit.trace`), which torch's C++ interpreter runs without
Python or the engine. The overhead is the difference between the first and the last. CPU time, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.workload import load_or_build_model
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.requests import RequestState
from ovis_model.types import Request, SamplingParams

PROMPT_TOKENS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="24x128")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_or_build_model(args.model, torch.device("cpu"), torch.float32)
    layers = model.config.language.num_hidden_layers
    target_ms = 0.1 + 0.02 * layers
    for rows in args.rows:
        engine_ms, decoder_ms, kernels_ms = measure_step_ms(EngineCore(model, eos_token_ids=()), rows, args.rounds)
        print(
            f"{rows:3} rows: step {engine_ms:6.2f} ms, decoder alone {decoder_ms:6.2f}, kernels {kernels_ms:6.2f}; "
            f"overhead {engine_ms - kernels_ms:5.2f} ms (target {target_ms:.2f})"
        )


@torch.inference_mode()
def measure_step_ms(engine: EngineCore, rows: int, rounds: int) -> tuple[float, float, float]:
    """Return the median ms of a step by the engine, the decoder and the recording, all over the same lengths."""
    running = start_rows(engine, rows)
    stepper, longest = engine.runner.stepper, max(row.num_cached for row in running)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated; it is what shows kernels without Python
        state = stepper._state.clone()
        recording = torch.jit.trace(lambda state: stepper._step(rows, longest)[0], (state,), check_trace=False)  # type: ignore[no-untyped-call]
    sides: list[Callable[[], object]] = [
        lambda: engine._step(),
        lambda: stepper.step(rows, longest),
        lambda: recording(state),
    ]
    times_ms: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for side, times in zip(sides, times_ms, strict=True):
            rewind_rows(running)
            stepper._state.copy_(state)
            started_s = time.process_time()
            side()
            times.append((time.process_time() - started_s) * 1e3)
    return tuple(statistics.median(times) for times in times_ms)  # type: ignore[return-value]


def start_rows(engine: EngineCore, rows: int) -> list[RequestState]:
    """Start rows of equal length whose output limit is beyond the benchmark's steps."""
    none = np.zeros((0, 3, engine.model.config.vision.image_size, engine.model.config.vision.image_size), np.uint8)
    request = Request(np.arange(PROMPT_TOKENS, dtype=np.int32), none, np.zeros((0, 2), np.int32))
    engine.enqueue([request] * rows, [SamplingParams(max_new_tokens=1000)] * rows)
    for _ in range(2):
        engine._step()
    return engine.scheduler.running


def rewind_rows(running: list[RequestState]) -> None:
    """Cut the rows back to their length at the first step, so that all steps see the same number of tokens."""
    for row in running:
        del row.output_ids[3:]


if __name__ == "__main__":
    main()
