"""Compare this project's engine with vLLM fed with the same embeddings: `python -m benchmarks.engines`.

Needs vLLM; see docs/vllm.md. Each side runs in a process of its own, in alternation, on one thread; CPU seconds of
`generate` after a first call, without the start, which is printed too. Random images, greedy answers of a fixed length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.inputs.processor import Processor
from ovis_model.training.export import export_network, make_network
from ovis_model.types import Request, SamplingParams

SIDES = ("ovis", "vllm")
SHAPES: dict[str, dict[str, Any]] = {
    "24x128": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 24},
    "114M": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
"""Decoders with random weights behind the demo model's tower; its other fields are the demo model's."""


def make_requests(model: str, rows: int, questions: int) -> list[Request]:
    """Return `rows` requests about `rows / questions` images, which are shared by that many questions each."""
    processor, rng = Processor.from_pretrained(model), np.random.default_rng(0)
    found: list[Request] = []
    for _ in range(rows // questions):
        height, width = rng.integers(200, 900, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        prompts = [processor.encode_prompt(f"Question {i}: what is it?", [image.size]) for i in range(questions)]
        found += processor.build_requests(prompts, [image])
    return found


def write_model(shape: str, target: Path) -> str:
    """Write a checkpoint of one of SHAPES with random weights; return its path."""
    demo = fetch_checkpoint("demo")
    config = OvisConfig.from_directory(demo)
    language = replace(config.language, **SHAPES[shape])
    if language.num_attention_heads % language.num_key_value_heads:
        raise ValueError(f"{shape} does not divide its heads")
    export_network(make_network(replace(config, language=language), 0), demo, target, {"made by": "a benchmark"})
    path = target / "config.json"  # export_network takes it from the demo model
    written = json.loads(path.read_text("utf-8"))
    written["llm_config"].update(SHAPES[shape])
    written["hidden_size"] = language.hidden_size
    path.write_text(json.dumps(written), "utf-8")
    return str(target)


def measure_side(side: str, model: str, rows: int, questions: int, tokens: int) -> dict[str, float]:
    """Return the CPU seconds of the start and of the second of two calls, in this process."""
    began_s = time.process_time()
    engine: Any
    if side == "ovis":
        from ovis_model.engine.engine import OvisEngine as Engine
    else:
        from ovis_model.engine.vllm_engine.engine import VllmEngine as Engine  # type: ignore[assignment]
    engine = Engine.from_pretrained(model, device="cpu", dtype="float32", num_threads=1)
    start_s = time.process_time() - began_s
    params = SamplingParams(max_new_tokens=tokens)
    engine.generate(make_requests(model, questions, questions), params)
    requests = make_requests(model, rows, questions)
    began_s = time.process_time()
    completions = engine.generate(requests, params)
    cpu_s = time.process_time() - began_s
    engine.close()
    return {"start_cpu_s": start_s, "cpu_s": cpu_s, "tokens": sum(len(one.output_ids) for one in completions)}


def compare(model: str, rows: int, questions: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the medians of both sides, measured in alternation, and how many times vLLM's CPU time ours takes."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            arguments = map(str, (model, rows, questions, tokens))
            command = [sys.executable, "-m", "benchmarks.engines", "--side", side, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        side: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for side, runs in found.items()
    }
    return {"questions": questions, **medians, "ratio": medians["vllm"]["cpu_s"] / medians["ovis"]["cpu_s"]}


def main() -> None:
    """Print a line for each workload; the last is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint, or one of " + ", ".join(SHAPES))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--side", nargs=5, metavar=("SIDE", "MODEL", "ROWS", "QUESTIONS", "TOKENS"), help="one side alone"
    )
    args = parser.parse_args()
    if args.side:
        side, model, *numbers = args.side
        print(json.dumps(measure_side(side, model, *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(args.model, Path(directory)) if args.model in SHAPES else args.model
        results = [compare(model, args.rows, questions, args.tokens, args.rounds) for questions in (1, 8)]
    for result in results:
        sides = ", ".join(
            f"{side} {result[side]['cpu_s']:.2f} CPU s (start {result[side]['start_cpu_s']:.0f})" for side in SIDES
        )
        print(f"{result['questions']} questions an image: {sides}; vllm takes {result['ratio']:.2f} times ovis")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
