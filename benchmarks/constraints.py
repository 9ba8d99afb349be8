"""What constraints cost: python -m benchmarks.constraints [--model 1B] [--rows 1 8 32] [--tokenizer tokenizer.json]

Masks alone: CPU and wall time of a step's masks while random answers grow. In the engine: CPU and wall time of a decode
step over rows that are held to a schema against the same rows sampled freely, in turn. Compilation: time of the
vocabulary and of a large schema, and when the first answer with neither at hand comes, against one with both.

Without --tokenizer the vocabulary is made up: bytes, then words of random letters, as many as the model has logits for.
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

from benchmarks.engine import load_or_build_model
from ovis_model.config import OvisConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.sampling import RandomStream, Sampler
from ovis_model.grammar import guides as constraints
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
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else made_up(size)
    ids = tokenizer.get_vocab()
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    print(f"{tokenizer.get_vocab_size()} tokens, {size} logits, {torch.get_num_threads()} threads")
    for name in ("text recognition", "product listing", "invoice"):
        masks_alone(name, Guides(tokenizer, size, eos), max(args.rows))
    for rows in args.rows:
        beside_the_model(model, tokenizer, rows, args.rounds)
    compilation(model, tokenizer, eos)


def made_up(size: int) -> Tokenizer:
    """A byte-level vocabulary of `size` tokens less the padding of the published ones."""
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


def masks_alone(name: str, guides: Guides, rows: int) -> None:
    """Of rows whose tokens are drawn evenly from what is allowed."""
    constraint = Constraint("json_schema", json.dumps(SCHEMAS[name]))
    rng, cpu_us, wall_us = np.random.default_rng(0), [], []
    for _ in range(5):
        answers = [(guides.guide(constraint), list[int]()) for _ in range(rows)]
        answers[0][0].at([])
        while answers:
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            masks = guides.masks(answers).result()
            cpu_us.append((time.process_time() - cpu_s) * 1e6 / len(answers))
            wall_us.append((time.perf_counter() - wall_s) * 1e6 / len(answers))
            allowed = np.unpackbits(masks, axis=1, bitorder="little")
            for (_, ids), row in zip(answers, allowed, strict=True):
                ids.append(int(rng.choice(np.flatnonzero(row))))
            answers = [(guide, ids) for guide, ids in answers if len(ids) < 100 and not guide.at(ids).is_stopped()]
    print(
        f"masks, {name}: {statistics.mean(cpu_us):.0f} us of CPU a row and step, median "
        f"{statistics.median(cpu_us):.0f}; wall {statistics.mean(wall_us):.0f} with up to {rows} rows"
    )


def beside_the_model(model: Ovis, tokenizer: Tokenizer, rows: int, rounds: int) -> None:
    free = SamplingParams(max_new_tokens=STEPS, temperature=1.0, seed=1)
    sides = [free, replace(free, constraint=ENDLESS)]
    engine = EngineCore(model, tokenizer=tokenizer, eos_token_ids=())
    times: list[list[tuple[float, float]]] = [[], []]
    for round_ in range(rounds + 1):
        for side, measured in zip(sides, times, strict=True):
            took = cpu_and_wall(steps_of(engine, rows, side))
            if round_:
                measured.append(took)
    forbid_ms = forbidding_ms(model, rows)
    print(f"{rows:3} rows: {forbid_ms:.2f} ms of CPU a step to unpack their masks and to apply them")
    for number, unit in enumerate(("CPU", "wall")):
        one, other = ([took[number] * 1e3 / (STEPS - 1) for took in measured] for measured in times)
        ratio = statistics.median(b / a for a, b in zip(one, other, strict=True))
        print(
            f"{rows:3} rows: step {statistics.median(one):7.1f} ms of {unit} free, {statistics.median(other):7.1f} "
            f"held to a schema; {ratio - 1:+.1%}"
        )


def forbidding_ms(model: Ovis, rows: int) -> float:
    size, params = model.config.language.vocab_size, [SamplingParams(constraint=ENDLESS)] * rows
    sampler = Sampler(params, [RandomStream(0)] * rows, size, model.device)
    logits, masks = torch.zeros(rows, size), np.full((rows, size // 8), 255, np.uint8)
    return statistics.median(cpu_and_wall(lambda: sampler._apply_masks(logits, masks))[0] * 1e3 for _ in range(20))


def steps_of(engine: EngineCore, rows: int, params: SamplingParams) -> Callable[[], None]:
    """All steps but the first, which runs the prompts."""
    waiting = engine.enqueue([prompt(engine.model.config, n) for n in range(rows)], [params] * rows)
    engine.step()

    def run() -> None:
        while not all(row.has_left for row in waiting):
            engine.step()

    return run


def compilation(model: Ovis, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
    size = model.config.language.vocab_size
    trie_s, _ = cpu_and_wall(lambda: constraints._token_trie(tokenizer, size, list(eos)))
    trie = constraints._token_trie(tokenizer, size, list(eos))
    grammar_s, _ = cpu_and_wall(lambda: constraints._matcher(LARGE, trie))
    num_keywords = LARGE.spec.count('":')
    engine = OvisEngine.from_model(model, tokenizer=tokenizer, eos_token_ids=())
    one, held = SamplingParams(max_new_tokens=1), SamplingParams(max_new_tokens=1, constraint=LARGE)
    firsts = [first_token_s(engine, params) for params in (one, one, held, held)]
    print(
        f"compilation: vocabulary {trie_s:.2f} s of CPU, once; a schema of {num_keywords} names {grammar_s:.3f} s. "
        f"First token of a picture of one tile: free after {firsts[1]:.2f} s, held to the schema after "
        f"{firsts[2]:.2f} s with nothing compiled, {firsts[3]:.2f} s with all"
    )


def first_token_s(engine: OvisEngine, params: SamplingParams) -> float:
    vision = engine.config.vision
    tile = np.zeros((1, 3, vision.image_size, vision.image_size), np.uint8)
    ids = np.r_[np.full(vision.tokens_per_tile, IMAGE_ATOM_ID), :PROMPT_TOKENS].astype(np.int32)
    request = Request(ids, tile, np.array([tile.shape[2:]], np.int32))
    return cpu_and_wall(lambda: engine.generate([request], params))[1]


def prompt(config: OvisConfig, first: int) -> Request:
    none = np.zeros((0, 3, config.vision.image_size, config.vision.image_size), np.uint8)
    return Request(np.arange(first, first + PROMPT_TOKENS, dtype=np.int32), none, np.zeros((0, 2), np.int32))


def cpu_and_wall(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, of all threads and by the clock."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


if __name__ == "__main__":
    main()
