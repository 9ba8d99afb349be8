"""Measure what constraints cost the engine.

    python -m benchmarks.constraints [--model 1B] [--rows 1 8 32] [--tokenizer FILE]

- Masks alone: CPU and wall time of the masks of a step, while random answers grow.
- In the engine: CPU and wall time of a decode step. Rows held to a schema and the same rows sampled freely alternate.
- Compilation: time to compile the vocabulary and a large schema, and the time to a first token with and without both
  compiled.

--tokenizer is a tokenizer.json. Without it the vocabulary is random: bytes, then words of random letters, about as many
as the model has logits.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.workload import load_or_build_model
from ovis_model.config import OvisConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.sampling import RandomStream, Sampler
from ovis_model.grammar import guides as guides_module
from ovis_model.grammar.guides import Guides
from ovis_model.network.ovis import Ovis
from ovis_model.types import IMAGE_ATOM_ID, Constraint, Request, SamplingParams
from tests.support.answer_types import SCHEMAS, record

PROMPT_TOKENS = 60
STEPS = 12
ITEM = SCHEMAS["invoice"]["properties"]["lines"]["items"]
ENDLESS = Constraint("json_schema", json.dumps({"type": "array", "items": ITEM, "minItems": 500}))
LARGE = Constraint("json_schema", json.dumps(record(**{f"field_{n}": SCHEMAS["invoice"] for n in range(25)})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1B", help="a published shape, with random weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    model = load_or_build_model(args.model, torch.device("cpu"), torch.float32)
    size = model.config.language.vocab_size
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else build_random_tokenizer(size)
    ids = tokenizer.get_vocab()
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.config = replace(model.config, eos_token_ids=tuple(eos))
    print(f"{tokenizer.get_vocab_size()} tokens, {size} logits, {torch.get_num_threads()} threads")
    for name in ("text recognition", "product listing", "invoice"):
        print_mask_times(name, Guides(tokenizer, size, eos), max(args.rows))
    for rows in args.rows:
        print_step_times(model, tokenizer, rows, args.rounds)
    print_compile_times(model, tokenizer, eos)


def build_random_tokenizer(size: int) -> Tokenizer:
    """Build a byte-level tokenizer with about 300 tokens less than `size`, like the padded published vocabularies."""
    rng = random.Random(0)
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(names)
    while len(words) < size - 300:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 12)))
        words[rng.choice(("", "Ġ", "Ġ")) + rng.choice((word, word, word.title()))] = None
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer


def print_mask_times(name: str, guides: Guides, rows: int) -> None:
    """Print the CPU and wall time of the masks of `rows` rows, which draw their tokens evenly from those allowed."""
    constraint = Constraint("json_schema", json.dumps(SCHEMAS[name]))
    rng, cpu_us, wall_us = np.random.default_rng(0), [], []
    for _ in range(5):
        answers = [(guides.make_guide(constraint), list[int]()) for _ in range(rows)]
        answers[0][0].advance_to([])
        while answers:
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            masks = guides.compute_masks(answers).result()
            cpu_us.append((time.process_time() - cpu_s) * 1e6 / len(answers))
            wall_us.append((time.perf_counter() - wall_s) * 1e6 / len(answers))
            allowed = np.unpackbits(masks, axis=1, bitorder="little")
            for (_, ids), row in zip(answers, allowed, strict=True):
                ids.append(int(rng.choice(np.flatnonzero(row))))
            answers = [
                (guide, ids) for guide, ids in answers if len(ids) < 100 and not guide.advance_to(ids).is_stopped()
            ]
    print(
        f"masks, {name}: {statistics.mean(cpu_us):.0f} us of CPU per row and step, median "
        f"{statistics.median(cpu_us):.0f}; wall {statistics.mean(wall_us):.0f} with up to {rows} rows"
    )


def print_step_times(model: Ovis, tokenizer: Tokenizer, rows: int, rounds: int) -> None:
    free = SamplingParams(max_new_tokens=STEPS, temperature=1.0, seed=1)
    sides = [free, replace(free, constraint=ENDLESS)]
    engine = EngineCore(model, tokenizer=tokenizer, eos_token_ids=())
    times: list[list[tuple[float, float]]] = [[], []]
    for round_ in range(rounds + 1):
        for side, measured in zip(sides, times, strict=True):
            took = measure_seconds(prepare_steps(engine, rows, side))
            if round_:
                measured.append(took)
    forbid_ms = measure_forbid_ms(model, rows)
    print(f"{rows:3} rows: {forbid_ms:.2f} ms of CPU per step to unpack and apply the masks")
    for number, unit in enumerate(("CPU", "wall")):
        one, other = ([took[number] * 1e3 / (STEPS - 1) for took in measured] for measured in times)
        ratio = statistics.median(b / a for a, b in zip(one, other, strict=True))
        print(
            f"{rows:3} rows: step {statistics.median(one):7.1f} ms of {unit} sampled freely, "
            f"{statistics.median(other):7.1f} held to a schema; {ratio - 1:+.1%}"
        )


def measure_forbid_ms(model: Ovis, rows: int) -> float:
    size, params = model.config.language.vocab_size, [SamplingParams(constraint=ENDLESS)] * rows
    sampler = Sampler(params, [RandomStream(0)] * rows, size, model.device)
    logits, masks = torch.zeros(rows, size), torch.full((rows, size // 8), 255, dtype=torch.uint8)
    return statistics.median(measure_seconds(lambda: sampler._apply_masks(logits, masks))[0] * 1e3 for _ in range(20))


def prepare_steps(engine: EngineCore, rows: int, params: SamplingParams) -> Callable[[], None]:
    """Run the first step, which does the prefill, and return a function that runs all decode steps."""
    waiting = engine.enqueue([make_text_request(engine.model.config, n) for n in range(rows)], [params] * rows)
    engine.step()

    def run() -> None:
        while not all(row.has_left for row in waiting):
            engine.step()

    return run


def print_compile_times(model: Ovis, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
    size = model.config.language.vocab_size
    trie_s, _ = measure_seconds(lambda: guides_module._make_token_trie(tokenizer, size, list(eos)))
    trie = guides_module._make_token_trie(tokenizer, size, list(eos))
    grammar_s, _ = measure_seconds(lambda: guides_module._start_matcher(LARGE, trie))
    num_keywords = LARGE.spec.count('":')
    engine = OvisEngine.from_model(model, tokenizer=tokenizer, eos_token_ids=())
    free, held = SamplingParams(max_new_tokens=1), SamplingParams(max_new_tokens=1, constraint=LARGE)
    firsts = [measure_first_token_s(engine, params) for params in (free, free, held, held)]
    print(
        f"compilation: vocabulary {trie_s:.2f} s of CPU, once; a schema of {num_keywords} names {grammar_s:.3f} s. "
        f"First token of an image of one tile: {firsts[1]:.2f} s sampled freely; held to the schema {firsts[2]:.2f} s "
        f"with nothing compiled, {firsts[3]:.2f} s with everything compiled"
    )


def measure_first_token_s(engine: OvisEngine, params: SamplingParams) -> float:
    vision = engine.config.vision
    tile = np.zeros((1, 3, vision.image_size, vision.image_size), np.uint8)
    ids = np.r_[np.full(vision.tokens_per_tile, IMAGE_ATOM_ID), :PROMPT_TOKENS].astype(np.int32)
    request = Request(ids, tile, np.array([tile.shape[2:]], np.int32))
    return measure_seconds(lambda: engine.generate([request], params))[1]


def make_text_request(config: OvisConfig, first: int) -> Request:
    none = np.zeros((0, 3, config.vision.image_size, config.vision.image_size), np.uint8)
    return Request(np.arange(first, first + PROMPT_TOKENS, dtype=np.int32), none, np.zeros((0, 2), np.int32))


def measure_seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of all threads and the wall-clock seconds of `run`."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


if __name__ == "__main__":
    main()
