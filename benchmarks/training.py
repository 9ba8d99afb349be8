"""Compare training with transformers' Trainer on the same rows and weights, in alternation.

    python -m benchmarks.training [--model demo] [--steps 20] [--batch-size 8] [--rounds 3]
    python -m benchmarks.training --model 24x128 --vocabulary 32768

`--vocabulary` gives a shape so many words and as many visual words, because both are large in the published sizes. Each
side runs in a process of its own, on one thread, in float32, without and with recomputed layers. Rows have images
of one to five tiles, several images, or text alone, and answers of drawn lengths. CPU seconds are those of whole steps
(loss, gradients, clipping, AdamW) after a warm-up; memory is the process's peak, and what the steps add to it. FLOPs
are counted by torch: those of one step, and where those of our forward pass go. The Trainer needs the package
accelerate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peer import build_peer, translate_ids
from benchmarks.workload import SHAPES
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.inputs.prompt import expand_atoms, make_placeholders
from ovis_model.inputs.tiling import count_tiles
from ovis_model.network.ovis import Ovis
from ovis_model.training.attention import PackedContext
from ovis_model.training.batch import Batch, collate
from ovis_model.training.examples import IGNORED_LABEL, TrainingExample
from ovis_model.training.export import load_network, make_network
from ovis_model.training.model import TrainingModel
from ovis_model.training.optimizer import Optimizer, Schedule
from ovis_model.training.parts import choose_trainable, group_parameters
from ovis_model.types import Grid, Request

SIDES = ("ours", "transformers", "ours, recomputed", "transformers, recomputed")
LEARNING_RATE, WARM_UP_STEPS = 1e-4, 2
GRIDS: tuple[tuple[Grid, ...], ...] = ((Grid(1, 1),), (Grid(1, 2),), (Grid(2, 2),), (Grid(1, 1), Grid(1, 1)), ())


@dataclass(frozen=True)
class TrainingCost:
    """What a side's steps took. Memory is in MB; `flops` are those of one step, `forward_flops` those of parts."""

    cpu_s: float
    peak_mb: float
    added_mb: float
    losses: list[float]
    flops: int
    forward_flops: dict[str, int]


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.side:
        torch.set_num_threads(1)
        print(json.dumps(asdict(run_side(args))))
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            results[side].append(run_in_process(side, sys.argv[1:]))
    print_costs(results, count_tokens(args), args)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint, or a shape such as 24x128")
    parser.add_argument("--vocabulary", type=int, metavar="WORDS", help="of a shape, instead of its own")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_in_process(side: str, argv: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training", *argv, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_side(args: argparse.Namespace) -> TrainingCost:
    network = build_network(args)
    run = run_trainer if args.side.startswith("transformers") else run_ours
    return run(network, make_batches(network, args), args.side.endswith("recomputed"))


def build_network(args: argparse.Namespace) -> Ovis:
    """Load a checkpoint, or build a shape with random weights."""
    if args.model not in SHAPES:
        return load_network(fetch_checkpoint(args.model))
    config = SHAPES[args.model]
    if args.vocabulary:
        vision = replace(config.vision, vocab_size=args.vocabulary)
        config = replace(config, vision=vision, language=replace(config.language, vocab_size=args.vocabulary))
    return make_network(config, seed=0)


def make_batches(network: Ovis, args: argparse.Namespace) -> list[list[TrainingExample]]:
    rng = np.random.default_rng(0)
    numbers = range(args.batch_size * (args.steps + WARM_UP_STEPS))
    examples = [draw_example(network, rng, GRIDS[i % len(GRIDS)]) for i in numbers]
    return [examples[i : i + args.batch_size] for i in range(0, len(examples), args.batch_size)]


def draw_example(network: Ovis, rng: np.random.Generator, grids: Sequence[Grid]) -> TrainingExample:
    """Draw a row: a prompt of 20 to 40 ids around its images, and an answer of 5 to 60."""
    vision, num_words = network.config.vision, network.config.language.vocab_size - 10
    images = [i for grid in grids for i in make_placeholders(grid)]
    text, answer = (rng.integers(0, num_words, int(rng.integers(*size))) for size in ((20, 40), (5, 60)))
    prompt = expand_atoms([*text[:5], *images, *text[5:]], vision.tokens_per_tile)
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    labels = np.where(np.arange(len(ids)) < len(prompt), IGNORED_LABEL, ids).astype(np.int32)
    shape = (sum(map(count_tiles, grids)), 3, vision.image_size, vision.image_size)
    tiles = rng.integers(0, 256, shape, dtype=np.uint8)
    return TrainingExample(ids, labels, tiles, np.full((len(tiles), 2), vision.image_size, np.int32))


def run_ours(network: Ovis, batches: list[list[TrainingExample]], recomputed: bool) -> TrainingCost:
    choose_trainable(network, "all")
    model = TrainingModel(network, checkpoint_layers=recomputed, recompute_head=recomputed)
    optimizer = Optimizer(group_parameters(network, LEARNING_RATE), Schedule(num_steps=len(batches), decay="constant"))
    meter, losses = Meter(), []
    for number, examples in enumerate(batches):
        meter.reach(number)
        loss, count = model.loss_sum(collate(examples, network.config.vision))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(count)
        losses.append(float(loss.detach()) / count)
    batch = collate(batches[0], network.config.vision)
    return meter.stop(losses, lambda: model.loss_sum(batch)[0], count_forward_flops(network, batch))


@torch.no_grad()
def count_forward_flops(network: Ovis, batch: Batch) -> dict[str, int]:
    """Count the FLOPs of a forward pass by part, as `TrainingModel` computes them."""
    decoder, positions = network.llm.model, batch.position_ids[None]
    context = PackedContext(batch.order, batch.lengths, len(batch.input_ids))
    pixels = network.normalize(batch.tiles, batch.tile_sizes)
    parts: dict[str, int] = {}

    def count(part: str, compute: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            result = compute(*arguments)
        parts[part] = counter.get_total_flops()
        return result

    features = count("vision tower", network.visual_tokenizer.compute_features, pixels)
    visual = count("visual head and table", network.embed_features, features.flatten(0, 1))
    embeds = network.embed(batch.input_ids, visual[batch.visual])[None]
    hidden = count("decoder", decoder, embeds, positions, context)
    count("logits of learnt ids", network.llm.compute_logits, hidden[0, batch.sources])
    return parts


def run_trainer(network: Ovis, batches: list[list[TrainingExample]], recomputed: bool) -> TrainingCost:
    import transformers

    class Sequential(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.reach(state.global_step)

    peer, meter = build_peer(network), Meter()
    peer.model.vision_tower.transformer.rms_norm = torch.nn.Identity()
    peer.train().requires_grad_()
    with tempfile.TemporaryDirectory() as directory:
        trainer = Sequential(
            peer,
            make_arguments(directory, len(batches), len(batches[0]), recomputed),
            data_collator=lambda rows: pad_rows(network, peer.config, rows),
            train_dataset=[example for batch in batches for example in batch],
            callbacks=[Watch()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return meter.stop(losses, lambda: peer(**pad_rows(network, peer.config, batches[0])).loss)


def make_arguments(directory: str, num_steps: int, batch_size: int, recomputed: bool) -> Any:
    import transformers

    return transformers.TrainingArguments(
        directory,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        gradient_checkpointing=recomputed,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def pad_rows(network: Ovis, config: Any, rows: Sequence[TrainingExample]) -> dict[str, torch.Tensor]:
    """Return the arguments of transformers' model for rows padded on the right."""
    ids = [translate_ids(Request(row.input_ids, row.tiles, row.tile_sizes), config) for row in rows]
    labels = [torch.from_numpy(row.labels).long() for row in rows]
    tiles, sizes = (
        torch.from_numpy(np.concatenate([getattr(r, name) for r in rows])) for name in ("tiles", "tile_sizes")
    )
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        "pixel_values": network.normalize(tiles, sizes),
    }


class Meter:
    """CPU seconds and memory of the steps after the warm-up."""

    def __init__(self) -> None:
        self._started_s, self._base_mb = 0.0, read_peak_mb()

    def reach(self, step: int) -> None:
        if step == WARM_UP_STEPS:
            self._started_s = read_cpu_s()

    def stop(
        self, losses: list[float], compute_loss: Callable[[], torch.Tensor], forward_flops: dict[str, int] | None = None
    ) -> TrainingCost:
        cpu_s, peak_mb = read_cpu_s() - self._started_s, read_peak_mb()
        with FlopCounterMode(display=False) as counter:
            compute_loss().backward()  # type: ignore[no-untyped-call]
        return TrainingCost(
            cpu_s, peak_mb, peak_mb - self._base_mb, losses, counter.get_total_flops(), forward_flops or {}
        )


def read_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def read_peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def count_tokens(args: argparse.Namespace) -> tuple[int, int]:
    """Return the tokens of all measured steps, and how many they are when padded."""
    lengths = [[len(x.input_ids) for x in batch] for batch in make_batches(build_network(args), args)[WARM_UP_STEPS:]]
    return sum(map(sum, lengths)), sum(max(batch) * len(batch) for batch in lengths)


def print_costs(results: dict[str, list[dict[str, Any]]], tokens: tuple[int, int], args: argparse.Namespace) -> None:
    real, padded = tokens
    print(f"{args.model}, batches of {args.batch_size}, {real} tokens in {args.steps} steps; padded: {padded}\n")
    print("| side | tokens per CPU second | peak MB | steps add MB | GFLOP a step | first and last loss |")
    print("|---|---|---|---|---|---|")
    for side, rounds in results.items():
        speeds = format_range([real / r["cpu_s"] for r in rounds], ".0f")
        memory = f"{min(r['peak_mb'] for r in rounds):.0f} | {min(r['added_mb'] for r in rounds):.0f}"
        losses = f"{rounds[0]['losses'][0]:.4f} {rounds[0]['losses'][-1]:.4f}"
        print(f"| {side} | {speeds} | {memory} | {rounds[0]['flops'] / 1e9:.2f} | {losses} |")
    print()
    for suffix in ("", ", recomputed"):
        pairs = zip(results[f"transformers{suffix}"], results[f"ours{suffix}"], strict=True)
        ratios = [theirs["cpu_s"] / ours["cpu_s"] for theirs, ours in pairs]
        print(f"ours{suffix}: {format_range(ratios, '.2f')} times as many tokens per CPU second")
    parts = results["ours"][0]["forward_flops"]
    print("; ".join(f"{part} {flops / sum(parts.values()):.0%}" for part, flops in parts.items()))
    print(json.dumps({"tokens": real, "padded_tokens": padded, "sides": results}))


def format_range(values: Sequence[float], form: str) -> str:
    """Return the median of values, with the least and the greatest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
