"""Compare eight tasks per item as siblings with the same tasks as eight separate requests.

    python -m benchmarks.tasks [--model vision-bound]

`--model` is `tiny56-tied`, `tiny112-untied`, a shape of `benchmarks.engine` such as 1B (with `--dtype bfloat16`), or
`vision-bound`: 256 tokens per tile, random weights, most of the arithmetic in the vision tower. Photographs and drawn
images alternate. Four tasks are free text, which ends after a fixed number of tokens; four are choices. Each side is
one call of the same engine. The sides alternate in one thread; the results are medians of CPU seconds. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count, islice

import numpy as np
import torch
from PIL import Image

from benchmarks.workload import SHAPES, load_or_build_model
from demo.drawings import make_picture
from ovis_model.config import LanguageConfig, OvisConfig, VisionConfig
from ovis_model.engine.calls import Stats
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Completion, Request, SamplingParams
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir
from tests.support.photographs import find_photographs

VISION_BOUND = OvisConfig(
    vision=VisionConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=448,
        vocab_size=4096,
    ),
    language=LanguageConfig(
        hidden_size=128,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=640,
        tie_word_embeddings=True,
    ),
)
TASKS: dict[str, int | list[str]] = {
    "Describe the image.": 32,
    "Give up to five tags, separated by commas.": 16,
    "What text is in the image? Answer with the text and nothing else.": 16,
    "Answer with a JSON object: kind, colour, position.": 32,
    "Is there a person?": ["Yes", "No"],
    "Is it a photograph?": ["Yes", "No"],
    "How many objects are there? Answer with a number.": [str(number) for number in range(10)],
    "Which shape is the largest?": ["circle", "square", "triangle", "star", "none of these"],
}
"""{prompt: number of answer tokens, or the choices}"""


def main() -> None:
    args = _parse()
    torch.set_num_threads(1)
    SHAPES["vision-bound"] = VISION_BOUND
    name = str(checkpoint_dir(args.model)) if args.model in CHECKPOINTS else args.model
    model = load_or_build_model(name, torch.device("cpu"), getattr(torch, args.dtype))
    engine = OvisEngine.from_model(model, eos_token_ids=())
    items, params = make_requests(engine.config, args.items, args.max_tiles)
    sides = {"siblings": items, "separate": [[_remove_group(request) for request in item] for item in items]}
    for side in sides.values():  # warm
        _time_run(engine, side[:1], params)
    rounds = [{side: _time_run(engine, sides[side], params) for side in sides} for _ in range(args.rounds)]
    print(json.dumps(summarize_tasks(args, sides["siblings"], rounds)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vision-bound")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--max-tiles", type=int, default=1, help="per item (default 1)")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def make_requests(config: OvisConfig, items: int, max_tiles: int) -> tuple[list[list[Request]], list[SamplingParams]]:
    """Make the requests of each item, which form one group, and the sampling parameters of each task."""
    processor = Processor(config, load_tokenizer(checkpoint_dir("tiny56-tied")))
    requests: list[list[Request]] = []
    for image in islice(_generate_images(), items):
        each = [processor.build_request(prompt, [image], max_tiles) for prompt in TASKS]
        requests.append([replace(request, tiles=each[0].tiles, group=len(requests)) for request in each])
    return requests, [_make_params(answer, processor.encode_answer) for answer in TASKS.values()]


def _make_params(answer: int | list[str], encode: Callable[[str], list[int]]) -> SamplingParams:
    if isinstance(answer, int):
        return SamplingParams(max_new_tokens=answer)
    return SamplingParams(choices=tuple(tuple(encode(choice)) for choice in answer))


def _generate_images() -> Iterator[Image.Image]:
    for seed in count():
        for path in find_photographs()[seed : seed + 1]:
            with Image.open(path) as photograph:
                yield photograph.convert("RGB")
        yield make_picture(seed, held_out=False)[0]


def _remove_group(request: Request) -> Request:
    """Return the request without its group, so that it has no siblings."""
    return replace(request, group=None)


def _time_run(
    engine: OvisEngine, items: Sequence[Sequence[Request]], params: list[SamplingParams]
) -> tuple[float, Stats, list[Completion]]:
    before = engine.stats
    started_s = time.process_time()
    completions = engine.generate([request for item in items for request in item], params * len(items))
    return time.process_time() - started_s, engine.stats - before, completions


def summarize_tasks(
    args: argparse.Namespace,
    items: list[list[Request]],
    rounds: list[dict[str, tuple[float, Stats, list[Completion]]]],
) -> dict[str, object]:
    pairs = list(zip(rounds[0]["siblings"][2], rounds[0]["separate"][2], strict=True))
    choice_probs = [(p, q) for a, b in pairs if (p := a.choice_probs) is not None and (q := b.choice_probs) is not None]
    cpu_s = {side: statistics.median(r[side][0] for r in rounds) for side in rounds[0]}
    result = {
        "model": args.model,
        "items": len(items),
        "tiles": sum(len(item[0].tiles) for item in items),
        "ratio": statistics.median(r["separate"][0] / r["siblings"][0] for r in rounds),
        "equal_answers": sum(a.output_ids.tolist() == b.output_ids.tolist() for a, b in pairs),
        "answers": len(pairs),
        "largest_difference_of_probabilities": max(float(np.abs(a - b).max()) for a, b in choice_probs),
        **{side: {"cpu_s": cpu_s[side], **asdict(rounds[-1][side][1])} for side in cpu_s},
    }
    print(
        f"{args.model}: {len(items)} items, {cpu_s['separate']:.2f} -> {cpu_s['siblings']:.2f} CPU s, "
        f"{result['ratio']:.2f} times less; {result['equal_answers']} of {len(pairs)} answers equal; tiles encoded "
        f"{rounds[0]['separate'][1].tiles} -> {rounds[0]['siblings'][1].tiles}, prompt tokens "
        f"{rounds[0]['separate'][1].prompt_tokens} -> {rounds[0]['siblings'][1].prompt_tokens}"
    )
    return result


if __name__ == "__main__":
    main()
