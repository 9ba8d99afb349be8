"""Compare the engine with transformers' padded `generate` on the same rows and weights, in alternation.

    python -m benchmarks.engine --model demo
    python -m benchmarks.engine --model 24x128 --rows 96
    python -m benchmarks.engine --model 1B --dtype bfloat16 --rows 8 --image-size 448x448 --output-median 32
    python -m benchmarks.engine --model demo --pipeline
    python -m benchmarks.engine --model 34B --device cuda --dtype bfloat16 --ranks 1     (or 2, 4, 8: a GPU each)

`--model` is a checkpoint, or a shape with random weights: 1B 2B 4B 8B 16B 34B, or 24x128. The latter has 24 layers of
width 128, so a step costs everything but arithmetic. Answers have drawn lengths (log-normal) and ignore end-of-text
ids. The ratios compare with transformers at its best batch size of those tried.

`--pipeline` runs `jobs.caption` over image files instead; there the model decides where answers end. `--ranks` runs the
engine alone over that many processes and also measures an all-reduce between them; `--model` must then be a shape.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.roofline import measure_ceilings
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import NUM_INDICATORS, SIZES, LanguageConfig, OvisConfig, VisionConfig
from ovis_model.engine.calls import Stats
from ovis_model.engine.cost import compute_cost
from ovis_model.engine.decode_step import CudaGraphs, run_eagerly
from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.kv_cache import compute_bytes_per_token
from ovis_model.engine.memory_plan import bound_transient_bytes, plan_for_device
from ovis_model.engine.scheduler import Budget
from ovis_model.inputs.prompt import expand_atoms, make_placeholders
from ovis_model.inputs.tiling import choose_grid, tile_image
from ovis_model.network.ovis import Ovis
from ovis_model.network.tensor_parallel import ALONE, Shard, join_ranks
from ovis_model.network.weights import allocate_model, find_targets, load_model
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID, Request, SamplingParams
from pipelines.cluster.actor import exit_at_once

SHAPES = {
    **SIZES,
    "24x128": OvisConfig(
        vision=VisionConfig(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=112,
            vocab_size=517,
        ),
        language=LanguageConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=640,
            tie_word_embeddings=True,
        ),
    ),
}
ROOT = Path(__file__).parent.parent
NUM_TEXT_TOKENS = 37
"""Text tokens of a prompt, image excluded; about the length of "Describe the image." in Qwen's chat format."""


@dataclass(frozen=True)
class Workload:
    """Requests, the number of output tokens of each, and the seconds that tiling their images took."""

    requests: list[Request]
    output_lengths: list[int]
    preprocess_s: float = 0.0


@dataclass(frozen=True)
class Timing:
    cpu_s: float
    wall_s: float
    outputs: list[list[int]]


def main() -> None:
    args = parse_options(sys.argv[1:])
    if args.pipeline:
        print(json.dumps(run_caption_job(args)))
        return
    if args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            spawn(_run_rank, (Path(directory) / "meeting_point", args), nprocs=args.ranks)  # type: ignore[no-untyped-call]
        return
    print_report(measure_engine(args))


def measure_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Run the engine and, by default, transformers in alternation; return the report."""
    torch.set_num_threads(args.threads)
    model = load_or_build_model(args.model, torch.device(args.device), getattr(torch, args.dtype))
    workload = _make_workload(model.config, args)
    graphs = _CountedGraphs()
    step_runner = graphs if args.graphs and model.device.type == "cuda" else lambda: run_eagerly
    engine = OvisEngine.from_model(
        model, budget=_plan_budget(model, args.kv_tokens), make_step_runner=step_runner, eos_token_ids=()
    )
    print(engine.describe(), file=sys.stderr)
    sides: dict[str, Callable[[], list[list[int]]]] = {"engine": lambda: _run_engine(engine, workload)}
    if args.peer:
        peer = build_peer(model)
        for size in args.peer_batch:
            sides[f"transformers, batch {size}"] = lambda size=size: _run_transformers(peer, model, workload, size)  # type: ignore[misc]
    if model.device.type == "cuda":
        engine.warm_up()
    _run_engine(engine, Workload(workload.requests[:2], [2, 2]))
    before, num_captured = engine.stats, graphs.num_captured
    rounds, failures = _time_rounds(sides, args.rounds)
    report = summarize_rounds(rounds, model, engine.stats - before, workload)
    planned = engine.backend.core.scheduler.budget  # type: ignore[union-attr]
    return {
        **report,
        "failures": failures,
        "captures_after_warm_up": graphs.num_captured - num_captured,
        "weights_gb": sum(parameter.nbytes for parameter in model.parameters()) / 1e9,
        "planned_gb": _count_planned_bytes(model, planned) / 1e9,
    }


class _CountedGraphs:
    """A factory of CUDA graphs that counts their captures, also of caches that are gone."""

    def __init__(self) -> None:
        self.num_captured = 0

    def __call__(self) -> CudaGraphs:
        counted = self

        class Counted(CudaGraphs):
            def _capture(self, run: Callable[[], None]) -> Callable[[], object]:
                counted.num_captured += 1
                return super()._capture(run)

        return Counted()


def _plan_budget(model: Ovis, kv_tokens: int | None) -> Budget:
    """Plan the memory; with `kv_tokens`, limit the cache so that the other side finds memory too."""
    budget = plan_for_device(model.config, model.dtype, model.device, model.shard)
    return replace(budget, kv_tokens=min(budget.kv_tokens, kv_tokens or budget.kv_tokens))


def _count_planned_bytes(model: Ovis, budget: Budget) -> int:
    cache = budget.kv_tokens * compute_bytes_per_token(model.config.language, model.dtype)
    return cache + bound_transient_bytes(model.config, model.dtype, budget, model.pass_dtype)


def _time_rounds(
    sides: dict[str, Callable[[], list[list[int]]]], count: int
) -> tuple[list[dict[str, Timing]], dict[str, str]]:
    """Time the sides in alternation; return the timings, and why a side could not finish."""
    failures: dict[str, str] = {}
    rounds: list[dict[str, Timing]] = [{} for _ in range(count)]
    for timings in rounds:
        for name, side in sides.items():
            try:
                if name not in failures:
                    timings[name] = _time_side(side)
            except torch.OutOfMemoryError as error:
                failures[name] = str(error).splitlines()[0]
                torch.cuda.empty_cache()
    return [{n: t for n, t in timings.items() if n not in failures} for timings in rounds], failures


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="checkpoint or shape (default demo)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--image-size", default="640x480", help="width x height in pixels (default 640x480)")
    parser.add_argument("--max-tiles", type=int, default=9)
    parser.add_argument("--output-median", type=int, default=80, help="tokens (default 80)")
    parser.add_argument("--output-cap", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=0, help="tensor-parallel processes; 1 also starts NCCL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="also run transformers")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[8, 32], help="batch sizes (default 8 32)")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="use CUDA graphs")
    parser.add_argument("--pipeline", action="store_true", help="run the whole job over files, not the engine alone")
    parser.add_argument("--kv-tokens", type=int, help="limit the cache to so many tokens")
    return parser.parse_args(argv)


def load_or_build_model(name: str, device: torch.device, dtype: torch.dtype) -> Ovis:
    """Load a checkpoint, or build a shape of SHAPES with random weights.

    The vision tower gets the norm that transformers adds after it, so that both sides compute the same.
    """
    if name not in SHAPES:
        return load_model(fetch_checkpoint(name), device=device, dtype=dtype, post_trunk_norm=True)
    return _build_random_model(SHAPES[name], device, dtype, ALONE)


def _build_random_model(config: OvisConfig, device: torch.device, dtype: torch.dtype, shard: Shard) -> Ovis:
    model = allocate_model(config, device=device, dtype=dtype, post_trunk_norm=True, shard=shard)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.05, generator=generator)
    return model


def _make_workload(config: OvisConfig, args: argparse.Namespace) -> Workload:
    rng = np.random.default_rng(args.seed)
    output_lengths = np.exp(rng.normal(math.log(args.output_median), 0.6, args.rows)).clip(1, args.output_cap)
    images = _draw_images(args.image_size, args.rows, args.seed)
    started_s = time.perf_counter()
    requests = [_make_request(config, rng, image, args.max_tiles) for image in images]
    return Workload(requests, output_lengths.astype(int).tolist(), time.perf_counter() - started_s)


def _draw_images(size: str, count: int, seed: int) -> Iterator[Image.Image]:
    """Yield images of `size`, e.g. "640x480": coarse noise, enlarged."""
    rng = np.random.default_rng(seed)
    width, height = map(int, size.split("x"))
    for _ in range(count):
        yield Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))


def _make_request(config: OvisConfig, rng: np.random.Generator, image: Image.Image, max_tiles: int) -> Request:
    side_px = config.vision.image_size
    tiles, sizes = tile_image(image, max_tiles, side_px)
    atoms = make_placeholders(choose_grid(*image.size, max_tiles, side_px))
    placeholders = expand_atoms(atoms, config.vision.tokens_per_tile)
    text = rng.integers(0, config.language.vocab_size // 2, NUM_TEXT_TOKENS, dtype=np.int32)
    return Request(np.concatenate([text[:12], placeholders, text[12:]]).astype(np.int32), tiles, sizes)


def _run_engine(engine: OvisEngine, workload: Workload) -> list[list[int]]:
    params = [SamplingParams(max_new_tokens=length) for length in workload.output_lengths]
    return [completion.output_ids.tolist() for completion in engine.generate(workload.requests, params)]


def _run_rank(rank: int, meeting_point: Path, args: argparse.Namespace) -> None:
    """Run one of `--ranks`; rank 0 prints the result."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    with join_ranks(rank, args.ranks, meeting_point, lambda: None) as shard:
        model = _build_random_model(SHAPES[args.model], torch.device(args.device), getattr(torch, args.dtype), shard)
        workload = _make_workload(model.config, args)
        engine = OvisEngine.from_model(model, eos_token_ids=())
        if model.device.type == "cuda":
            engine.warm_up()
        _run_engine(engine, Workload(workload.requests[:2], [2, 2]))
        before = engine.stats
        timing = _time_side(lambda: _run_engine(engine, workload))
        stats = engine.stats - before
        exchange_us = {f"[{tokens}, hidden_size]": _measure_all_reduce_us(model, tokens) for tokens in (1, 64, 8192)}
    if rank == 0:
        result = {
            "ranks": args.ranks,
            "images_per_s": len(workload.requests) / timing.wall_s,
            "output_tokens_per_s": sum(workload.output_lengths) / timing.wall_s,
            "seconds": {part: getattr(stats, f"{part}_s") for part in ("vision", "prefill", "decode")},
            "weights_gb": sum(p.numel() * p.itemsize for p in model.parameters()) / 1e9,
            "exchange_us": exchange_us,
        }
        print(json.dumps(result))
    exit_at_once()


def _measure_all_reduce_us(model: Ovis, tokens: int, times: int = 20) -> float:
    """Return the microseconds of one all-reduce, of which a forward pass has two per layer.

    With one rank this is the cost of its launch.
    """
    x = torch.zeros(tokens, model.config.language.hidden_size, device=model.device, dtype=model.dtype)
    torch.distributed.all_reduce(x)
    float(x[0, 0])
    started_s = time.perf_counter()
    for _ in range(times):
        torch.distributed.all_reduce(x)
    float(x[0, 0])  # waits for the device
    return (time.perf_counter() - started_s) / times * 1e6


def build_peer(model: Ovis) -> Any:
    """Build transformers' Ovis2 on the same weight tensors."""
    import transformers

    config, vision, language = model.config, asdict(model.config.vision), asdict(model.config.language)
    tied, first = language.pop("tie_word_embeddings"), language["vocab_size"] - 6
    peer_config = transformers.Ovis2Config(
        text_config={**language, "model_type": "qwen2", "rope_theta": config.language.rope_theta},
        vision_config=vision,
        hidden_size=config.language.hidden_size,
        vocab_size=config.language.vocab_size,
        image_token_id=first,
        visual_indicator_token_ids=list(range(first + 1, first + 1 + NUM_INDICATORS)),
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        peer: Any = transformers.Ovis2ForConditionalGeneration(peer_config)
    peer.to_empty(device=model.device)
    weights = {name: target.tensor for name, target in find_targets(model, "native").items()}
    peer.load_state_dict(weights, strict=False, assign=True)
    peer.tie_weights()
    head_dim, theta = config.language.head_dim, config.language.rope_theta
    exponents = torch.arange(0, head_dim, 2, device=model.device).float() / head_dim
    rotary = peer.model.language_model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq = 1.0 / theta**exponents
    patches = torch.arange(config.vision.num_patches, device=model.device)
    peer.model.vision_tower.transformer.embeddings.position_ids = patches[None]
    return peer.eval()


def _run_transformers(peer: Any, model: Ovis, workload: Workload, batch_size: int) -> list[list[int]]:
    outputs: list[list[int]] = []
    for start in range(0, len(workload.requests), batch_size):
        part = slice(start, start + batch_size)
        requests, output_lengths = workload.requests[part], workload.output_lengths[part]
        ids = torch.stack([translate_ids(request, peer.config) for request in requests]).to(
            model.device
        )  # of one length
        pixels = torch.cat([normalize_tiles(model, request) for request in requests])
        with torch.inference_mode():
            out = peer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=max(output_lengths),
                eos_token_id=None,
                pad_token_id=0,
            )
        new = out[:, ids.shape[1] :].tolist()
        outputs += [row[:length] for row, length in zip(new, output_lengths, strict=True)]
    return outputs


def translate_ids(request: Request, config: Any) -> Tensor:
    """Return the input ids of `request` with transformers' ids for the placeholders."""
    ids = request.input_ids.astype(np.int64)
    at = request.input_ids <= IMAGE_START_ID
    ids[at] = np.array(config.visual_indicator_token_ids)[IMAGE_START_ID - request.input_ids[at]]
    ids[request.input_ids == IMAGE_ATOM_ID] = config.image_token_id
    return torch.from_numpy(ids)


def normalize_tiles(model: Ovis, request: Request) -> Tensor:
    """Return the tiles of `request` as the model takes them, [tiles, 3, H, W]."""
    tiles, sizes = torch.from_numpy(request.tiles), torch.from_numpy(request.tile_sizes)
    return model.normalize(tiles.to(model.device), sizes.to(model.device)).to(model.dtype)


def _time_side(side: Callable[[], list[list[int]]]) -> Timing:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    outputs = side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.process_time() - cpu_s, time.perf_counter() - wall_s, outputs)


def summarize_rounds(rounds: list[dict[str, Timing]], model: Ovis, stats: Stats, workload: Workload) -> dict[str, Any]:
    """Return the medians of each side, where the engine's time went, and the floor that no engine can undercut."""
    ours = rounds[0]["engine"].outputs
    sides = {name: _summarize_side([r[name] for r in rounds], ours) for name in rounds[0]}
    wall_s = sum(r["engine"].wall_s for r in rounds) / len(rounds)
    busy_s = {part: getattr(stats, f"{part}_s") / len(rounds) for part in ("vision", "prefill", "decode")}
    seconds = {"preprocess": workload.preprocess_s, **busy_s, "idle": wall_s - sum(busy_s.values())}
    ceilings = measure_ceilings(model.device, model.pass_dtype)
    first, slots = workload.requests[0], max(1, stats.slot_steps // max(1, stats.steps))
    needed = compute_cost(
        model.config,
        model.dtype,
        tiles=len(first.tiles),
        prompt=len(first.input_ids),
        output_lengths=workload.output_lengths,
        slots=slots,
    )
    return {
        "sides": sides,
        "ratio": _compute_best_ratio(sides, "cpu_s_per_image"),
        "wall_ratio": _compute_best_ratio(sides, "wall_s_per_image"),
        "seconds": seconds,
        "slots": slots,
        "slot_occupancy": stats.sequence_steps / max(1, stats.slot_steps),
        "peak_memory_gb": _read_peak_memory_gb(model.device),
        "ms_per_tile": stats.vision_s / max(1, stats.tiles) * 1e3,
        "prefill_tokens_per_s": stats.prompt_tokens / max(stats.prefill_s, 1e-9),
        "ms_per_step": stats.decode_s / max(1, stats.steps) * 1e3,
        "rows_per_step": stats.sequence_steps / max(1, stats.steps),
        "tflops_ceiling": ceilings.flops_per_s / 1e12,
        "gb_per_s_ceiling": ceilings.bytes_per_s / 1e9,
        "floor_s": needed.compute_floor_s(ceilings),
        "floor_ratio": wall_s / needed.compute_floor_s(ceilings),
        "flops_share_of_vision_and_prefill": (needed.vision_flops + needed.prefill_flops)
        / (busy_s["vision"] + busy_s["prefill"])
        / ceilings.flops_per_s,
        "bandwidth_share_of_decode": needed.decode_bytes / max(busy_s["decode"], 1e-9) / ceilings.bytes_per_s,
        **_describe_environment(model),
    }


def _summarize_side(timings: Sequence[Timing], ours: list[list[int]]) -> dict[str, float]:
    rows, tokens = len(ours), sum(map(len, ours))
    wall_s = statistics.median(t.wall_s for t in timings)
    return {
        "cpu_s_per_image": statistics.median(t.cpu_s for t in timings) / rows,
        "wall_s_per_image": wall_s / rows,
        "images_per_s": rows / wall_s,
        "output_tokens_per_s": tokens / wall_s,
        "rows": rows,
        "equal_rows": sum(a == b for a, b in zip(ours, timings[0].outputs, strict=True)),
    }


def _compute_best_ratio(sides: dict[str, dict[str, float]], figure: str) -> float | None:
    """Return `figure` of the best transformers side divided by the engine's; None without such a side."""
    theirs = [side[figure] for name, side in sides.items() if name != "engine"]
    return min(theirs) / sides["engine"][figure] if theirs else None


def _read_peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _describe_environment(model: Ovis) -> dict[str, str]:
    """Return the hardware, dtype, torch version and commit of this measurement."""
    cuda = model.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{_read_cpu_name()}, {torch.get_num_threads()} threads"
    return {"hardware": name, "dtype": str(model.dtype), "torch": torch.__version__, "commit": read_commit()}


def read_commit() -> str:
    """Return the commit that is checked out, or "unknown", e.g. in an image without git."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def _read_cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def print_report(result: dict[str, Any]) -> None:
    """Print the report as lines of text, then as JSON."""
    print(f"{result['hardware']}, {result['dtype']}, commit {result['commit']}")
    for name, side in result["sides"].items():
        print(
            f"{name:24} {side['cpu_s_per_image']:8.4f} CPU s/image {side['images_per_s']:8.2f} images/s "
            f"{side['output_tokens_per_s']:8.1f} tokens/s, {side['equal_rows']} rows equal the engine's"
        )
    split = ", ".join(f"{part} {s:.2f} s" for part, s in result["seconds"].items())
    print(f"{split}; slots in use {result['slot_occupancy']:.1%}; peak memory {result['peak_memory_gb']:.1f} GB")
    print(f"floor {result['floor_s']:.2f} s; the engine takes {result['floor_ratio']:.2f} times as long")
    print(json.dumps(result))


def run_caption_job(args: argparse.Namespace) -> dict[str, Any]:
    """Run `jobs.caption` over image files and return its JSON line.

    The time includes the start of Ray; `cpu_s_per_image` is the CPU time of the driver, without its actors.
    """
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "images")
        source.mkdir()
        for number, image in enumerate(_draw_images(args.image_size, args.rows, args.seed)):
            image.save(source / f"{number:06}.jpg", quality=90)
        command = [sys.executable, "-m", "jobs.caption", str(source), str(Path(directory, "output"))]
        options = ["--model", args.model, "--device", args.device, "--dtype", args.dtype]
        limits = ["--max-new-tokens", str(args.output_cap), "--max-tiles", str(args.max_tiles)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([*command, *options, *limits], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(run.stdout.splitlines()[-1]), "cpu_s_per_image": cpu_s / args.rows}


if __name__ == "__main__":
    main()
