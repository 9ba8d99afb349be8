"""Compare `ovis2 evaluate` with a loop that asks transformers' Ovis2 one item at a time, as VLMEvalKit does.

    python -m benchmarks.evaluation --items 200 --rounds 3

Both ask the same items of a drawn MMStar, with the demo model's weights in float32, on all CPUs, in alternation. The
loop decodes, tiles and tokenizes an item and generates its answer before it takes the next one. The job's seconds count
from its start to its last score, with Ray's start and the model's load; the loop's do not count its load.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.peer import build_peer, normalize_tiles, translate_ids
from benchmarks.workload import load_or_build_model
from demo.benchmarks import write_benchmarks
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.inputs.processor import Processor
from ovis_model.network.ovis import Ovis
from pipelines.evaluation.benchmarks import DATASETS
from pipelines.evaluation.files import read_items
from pipelines.evaluation.items import ImageCells, locate_rows
from pipelines.evaluation.prompts import place_images
from tests.support.roots import ROOT

NAME, MAX_NEW_TOKENS, MAX_TILES = "MMStar", 32, 9


def main() -> None:
    """Print the seconds of each round, and medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_items(Path(folder), args.items)
        model = load_or_build_model("demo", torch.device("cpu"), torch.float32)
        peer = build_peer(model)
        rounds = [
            {"job": time_job(data, Path(folder) / f"out{number}"), "loop": time_loop(data, model, peer)}
            for number in range(args.rounds)
        ]
    for line in rounds:
        print({side: round(seconds, 1) for side, seconds in line.items()})
    medians = {side: round(statistics.median(line[side] for line in rounds), 2) for side in rounds[0]}
    rates = {f"{side}_rows_per_s": round(args.items / seconds, 2) for side, seconds in medians.items()}
    print(json.dumps({"items": args.items, "rounds": args.rounds, **medians, **rates}))


def write_items(folder: Path, count: int) -> Path:
    """Write a benchmark of `count` items and return its file."""
    write_benchmarks(folder / "all", count)
    lines = (folder / "all" / f"{NAME}.tsv").read_text().splitlines(keepends=True)
    assert len(lines) > count
    target = folder / f"{NAME}.tsv"
    target.write_text("".join(lines[: count + 1]))
    return target


def time_job(data: Path, output: Path) -> float:
    """Return the seconds of the whole command."""
    command = [sys.executable, "-m", "jobs.evaluate", NAME, str(data), str(output), "--model", "demo", "--size", "1B"]
    options = ["--max-new-tokens", str(MAX_NEW_TOKENS), "--device", "cpu"]
    started_s = time.perf_counter()
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started_s


def time_loop(data: Path, model: Ovis, peer: Any) -> float:
    """Return the seconds in which transformers answers all items, one after the other."""
    torch.set_num_threads(os.cpu_count() or 1)
    processor = Processor.from_pretrained(fetch_checkpoint("demo"))
    started_s = time.perf_counter()
    items = read_items(str(data))
    with data.open("rb") as file:
        images = ImageCells(file, locate_rows(str(data)), str(data.parent))
        for item in items:
            _answer(item, images, processor, model, peer)
    return time.perf_counter() - started_s


def _answer(item: Any, images: ImageCells, processor: Processor, model: Ovis, peer: Any) -> None:
    dataset = DATASETS[NAME]
    assert dataset.ask is not None
    pictures = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in images.read(item)]
    prompt = place_images(dataset.ask(item, dataset.make_style("1B")), len(pictures))
    ids = processor.encode_prompt(prompt.query, [picture.size for picture in pictures], MAX_TILES, None)
    [request] = processor.build_requests([ids], pictures, MAX_TILES)
    tokens = translate_ids(request, peer.config)[None]
    with torch.inference_mode():
        peer.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=normalize_tiles(model, request),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=sorted(model.config.eos_token_ids),
            pad_token_id=0,
        )


if __name__ == "__main__":
    main()
