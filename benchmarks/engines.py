"""Compare this project's engine with vLLM, fed with our embeddings or by itself: `python -m benchmarks.engines`.

Needs vLLM; see docs/vllm.md. The sides are `ovis`, `vllm` (the engine of that name) and `own`: vLLM's own Ovis2, which
reads AIDC-AI's layout of checkpoints. It reverses the embeddings of the indicators, so its answers can differ. Each
side runs in a process of its own, in alternation, on one thread; CPU seconds from images to tokens in a second call,
without the start, which is printed too. Random images, greedy answers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.inputs.processor import Processor
from ovis_model.inputs.prompt import DEFAULT_SYSTEM_PROMPT
from ovis_model.network.ovis import CLIP_MEAN, CLIP_STD
from ovis_model.training.export import export_network, make_network
from ovis_model.types import Request, SamplingParams

Answers = list[list[int]]
Answer = Callable[[Sequence[Image.Image], Sequence[str]], Answers]
"""A side that has started: answer each question about each image, greedily -> token ids, image by image."""

SIDES = ("ovis", "vllm", "own")
SHAPES: dict[str, dict[str, Any]] = {
    "24x128": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 24},
    "114M": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
"""Decoders with random weights behind the demo model's tower; its other fields are the demo model's."""


def draw_images(count: int, seed: int) -> list[Image.Image]:
    """Return images of random sizes and pixels."""
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(200, 900, 2) for _ in range(count)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


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


def start_engine(side: str, model: str, tokens: int) -> Answer:
    """Start one of this project's engines."""
    engine: Any
    if side == "ovis":
        from ovis_model.engine.engine import OvisEngine as Engine
    else:
        from ovis_model.engine.vllm_engine.engine import VllmEngine as Engine  # type: ignore[assignment]
    engine = Engine.from_pretrained(model, device="cpu", dtype="float32", num_threads=1)
    processor, params = Processor.from_pretrained(model), SamplingParams(max_new_tokens=tokens)

    def answer(images: Sequence[Image.Image], questions: Sequence[str]) -> Answers:
        requests: list[Request] = []
        for image in images:
            prompts = [processor.encode_prompt(text, [image.size]) for text in questions]
            requests += processor.build_requests(prompts, [image])
        return [one.output_ids.tolist() for one in engine.generate(requests, params)]

    return answer


def start_own(model: str, tokens: int) -> Answer:
    """Start vLLM's own Ovis2, which prepares the images too."""
    from vllm import LLM
    from vllm import SamplingParams as VllmParams

    config = OvisConfig.from_directory(fetch_checkpoint(model))
    with tempfile.TemporaryDirectory() as directory:
        write_processor(fetch_checkpoint(model), config, Path(directory))
        llm = LLM(
            directory, dtype="float32", enforce_eager=True, max_model_len=config.max_length, disable_log_stats=True
        )
    params = VllmParams(
        temperature=0, max_tokens=tokens, detokenize=False, logprobs=0, stop_token_ids=list(config.eos_token_ids)
    )

    def answer(images: Sequence[Image.Image], questions: Sequence[str]) -> Answers:
        prompts = [
            {"prompt": render_prompt(text), "multi_modal_data": {"image": image}}
            for image in images
            for text in questions
        ]
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]

    return answer


def render_prompt(question: str) -> str:
    """Return Ovis2's chat format with one image, as text."""
    turns = f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<image>\n{question}<|im_end|>\n"
    return f"{turns}<|im_start|>assistant\n"


def write_processor(checkpoint: Path, config: OvisConfig, target: Path) -> None:
    """Link `checkpoint` in `target`, and describe the tokenizer and the image processor as transformers reads them."""
    for path in checkpoint.iterdir():
        (target / path.name).symlink_to(path)
    size = config.vision.image_size
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "do_center_crop": False,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": int(Image.Resampling.BICUBIC),
    }
    found = {
        "preprocessor_config.json": image_processor,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
    }
    for name, content in found.items():
        if not (target / name).exists():
            (target / name).write_text(json.dumps(content), "utf-8")


def measure_side(side: str, model: str, rows: int, questions: int, tokens: int) -> dict[str, Any]:
    """Return the CPU seconds of the start and of the second of two calls, in this process, and the answers."""
    began_s = time.process_time()
    answer = start_own(model, tokens) if side == "own" else start_engine(side, model, tokens)
    start_s = time.process_time() - began_s
    texts = [f"Question {i}: what is it?" for i in range(questions)]
    answer(draw_images(1, seed=1), texts)
    images = draw_images(rows // questions, seed=0)
    began_s = time.process_time()
    answers = answer(images, texts)
    return {"start_cpu_s": start_s, "cpu_s": time.process_time() - began_s, "answers": answers}


def compare(model: str, rows: int, questions: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the medians of all sides, measured in alternation, and how their answers compare."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            arguments = map(str, (model, rows, questions, tokens))
            command = [sys.executable, "-m", "benchmarks.engines", "--side", side, *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=make_environment())
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    expected = found["ovis"][0]["answers"]
    return {"questions": questions, **{side: summarize(runs, expected) for side, runs in found.items()}}


def make_environment() -> dict[str, str]:
    """Return the environment of a side: one thread, vLLM in the process itself, and the cache that the engine has."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **settings}


def summarize(runs: Sequence[dict[str, Any]], expected: Answers) -> dict[str, float]:
    """Return the medians of one side, its number of tokens, and how many of its answers are the `expected` ones."""
    medians = {key: statistics.median(run[key] for run in runs) for key in ("start_cpu_s", "cpu_s")}
    answers = runs[0]["answers"]
    num_equal = sum(one == other for one, other in zip(expected, answers, strict=True))
    return {**medians, "tokens": sum(map(len, answers)), "equal": num_equal}


def describe(found: dict[str, float]) -> str:
    """Describe the figures of one side in a line."""
    cost = f"{found['cpu_s']:.2f} CPU s (start {found['start_cpu_s']:.0f})"
    return f"{cost}, {found['tokens']:.0f} tokens, {found['equal']:.0f} answers equal those of ovis"


def main() -> None:
    """Print a line for each workload and side; the last is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint, or one of " + ", ".join(SHAPES))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 8], help="numbers of questions an image")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--side", nargs=5, metavar=("SIDE", "MODEL", "ROWS", "QUESTIONS", "TOKENS"), help="one side alone"
    )
    args = parser.parse_args()
    if args.side:
        side, model, *numbers = args.side
        print(json.dumps(measure_side(side, model, *map(int, numbers))), flush=True)
        os._exit(0)  # vLLM's threads need not end
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(args.model, Path(directory)) if args.model in SHAPES else args.model
        results = [compare(model, args.rows, questions, args.tokens, args.rounds) for questions in args.questions]
    for result in results:
        print(f"{args.rows} answers, {result['questions']} questions an image:")
        for side in SIDES:
            print(f"  {side}: {describe(result[side])}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
