"""Measure what a model can do on drawn images that it has never seen, skill by skill.

    python -m demo.skills MODEL... [--count 300]

Prints a Markdown table with a column per model. An answer is right if it equals the true one, letter by letter. The
last row is the share of pairs in which the model finds the longer of two true answers more probable than the brief one.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from demo.data import Form, Lesson, make_lesson
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.inputs.prompt import IMAGE_MARK
from ovis_model.inputs.tiling import choose_grid, tile_images
from ovis_model.tokenizer import load_tokenizer
from ovis_model.training.examples import ExampleBuilder, PreferenceExample, TiledImages
from ovis_model.training.export import load_network
from ovis_model.training.model import TrainingModel
from ovis_model.training.preference import collate_pairs, compute_reference
from ovis_model.types import Engine, Request, SamplingParams

MEASURED: tuple[Form, ...] = ("caption", "large", "picture", "pair", "clip", "text")
FIRST_SEED = 500_000_000
_MAX_TILES, _MAX_TILES_OF_SEVERAL = 9, 1
_PAIRS_PER_BATCH = 50


def main() -> None:
    """Measure the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--count", type=int, default=300, help="number of rows of each form")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(render_table({model: measure_skills(model, options.count) for model in options.models}))


def measure_skills(model: str, count: int) -> dict[str, float]:
    """Return {skill: share of right answers} of a checkpoint, by `count` held-out rows of each form."""
    with OvisEngine.from_pretrained(model, device="cpu", dtype="float32") as engine:
        marks = mark_answers(engine, Processor.from_pretrained(model), count)
    shares = {skill: sum(right) / len(right) for skill, right in marks.items()}
    return {**shares, "prefers the longer answer": measure_preference(model, count)}


def mark_answers(engine: Engine, processor: Processor, count: int) -> dict[str, list[bool]]:
    """Return for each skill whether the greedy answers about `count` held-out rows of each form are right."""
    marks = defaultdict[str, list[bool]](list)
    for form in MEASURED:
        asked = [pair for i in range(count) for pair in ask(processor, _make_lesson(form, i))]
        completions = engine.generate([request for _, _, request in asked], SamplingParams(max_new_tokens=64))
        for (skill, answer, _), completion in zip(asked, completions, strict=True):
            if skill != "free":  # has two true answers
                marks[_name_skill(form, skill)].append(processor.detokenize(completion.output_ids) == answer)
    return dict(sorted(marks.items()))


def ask(processor: Processor, lesson: Lesson) -> Iterator[tuple[str, str, Request]]:
    """Yield (skill, answer, request) of each question of a lesson, each asked alone."""
    max_tiles = _choose_max_tiles(lesson)
    prompts = [
        processor.encode_prompt(write_prompt(lesson, asked.text), [image.size for image in lesson.images], max_tiles)
        for asked in lesson.asked
    ]
    requests = processor.build_requests(prompts, lesson.images, max_tiles)
    for asked, request in zip(lesson.asked, requests, strict=True):
        yield asked.skill, asked.answer, request


def write_prompt(lesson: Lesson, question: str) -> str:
    """Return the text of a question, as the jobs ask it: with a mark for each frame of a clip, and else none."""
    marks = "\n".join([IMAGE_MARK] * len(lesson.images)) + "\n" if lesson.is_clip else ""
    return f"{marks}{lesson.preface}{question}"


def measure_preference(model: str, count: int) -> float:
    """Return the share of `count` held-out pairs whose chosen answer is the more probable one."""
    directory = fetch_checkpoint(model)
    config = OvisConfig.from_directory(directory)
    builder, network = ExampleBuilder(config, load_tokenizer(directory)), TrainingModel(load_network(directory))
    pairs = [_build_pair(builder, _make_lesson("preference", i), config.vision.image_size) for i in range(count)]
    batches = [pairs[start : start + _PAIRS_PER_BATCH] for start in range(0, count, _PAIRS_PER_BATCH)]
    found = torch.cat([compute_reference(network, collate_pairs(batch, config.vision)) for batch in batches])
    return float((found[:, 0] > found[:, 1]).float().mean())


def _build_pair(builder: ExampleBuilder, lesson: Lesson, tile_size: int) -> PreferenceExample:
    [asked], [image] = lesson.asked, lesson.images
    tiles, sizes = tile_images([image], _MAX_TILES, tile_size)
    images = TiledImages(tiles, sizes, (choose_grid(*image.size, _MAX_TILES, tile_size),))
    return builder.build_preference([("user", asked.text)], asked.answer, lesson.rejected, images)


def _make_lesson(form: Form, number: int) -> Lesson:
    return make_lesson(form, FIRST_SEED + number, held_out=True)


def _choose_max_tiles(lesson: Lesson) -> int:
    return _MAX_TILES if len(lesson.images) == 1 else _MAX_TILES_OF_SEVERAL


def _name_skill(form: Form, skill: str) -> str:
    if form == "text":
        return "text alone"
    return f"{skill}, several tiles" if form == "large" else skill


def render_table(shares: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table: a row per skill, a column per model, in percent."""
    names = [Path(model).parent.name if Path(model).name == "model" else model for model in shares]
    lines = [f"| skill | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for skill in next(iter(shares.values())):
        lines.append(f"| {skill} | {' | '.join(f'{found[skill]:.1%}' for found in shares.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
