"""Compare the engine with transformers' padded `generate` on the same rows and weights, interleaved.

    python -m benchmarks.engine --model demo
    python -m benchmarks.engine --model 24x128 --rows 96
    python -m benchmarks.engine --model 1B --dtype bfloat16 --rows 8 --image-size 448x448 --output-median 32
    python -m benchmarks.engine --model demo --pipeline
    python -m benchmarks.engine --model 34B --device cuda --dtype bfloat16 --ranks 1     (or 2, 4, 8: a GPU each)

`--model` is a checkpoint, or a shape with random weights: 1B 2B 4B 8B 16B 34B, or 24x128 (24 layers of width 128, where
the cost of a step is everything but arithmetic). Answers end after a drawn number of tokens, log-normal, not at an
end-of-text id. Transformers gets its best batch size of those tried. `--pipeline` runs `jobs.caption` over pictures in
files instead, where answers end as the model likes. With `--ranks` the engine runs alone, over that many processes, and
what an exchange between them takes is told; the model is a shape then. The last line is JSON.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.roofline import ceilings, cost
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import NUM_INDICATORS, SIZES, LanguageConfig, OvisConfig, VisionConfig
from ovis_model.engine.calls import Stats
from ovis_model.engine.decode_step import run_eagerly
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.prompt import expand_atoms, image_placeholders
from ovis_model.inputs.tiling import choose_grid, tile_image
from ovis_model.network.ovis import Ovis
from ovis_model.network.tensor_parallel import ALONE, Shard, joined
from ovis_model.network.weights import empty_model, find_targets, load_model
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID, Request, SamplingParams
from pipelines.cluster.actor import leave

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
"""Of a prompt beside the image: "Describe the image." in Qwen's chat format is about as long."""


@dataclass(frozen=True)
class Work:
    """Rows, how many tokens each is to get, and how long their pictures took to tile."""

    requests: list[Request]
    lengths: list[int]
    preprocess_s: float = 0.0


@dataclass(frozen=True)
class Timing:
    cpu_s: float
    wall_s: float
    outputs: list[list[int]]


def main() -> None:
    args = _parse()
    if args.pipeline:
        print(json.dumps(run_pipeline(args)))
        return
    if args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            spawn(_run_rank, (Path(directory) / "meeting_point", args), nprocs=args.ranks)  # type: ignore[no-untyped-call]
        return
    torch.set_num_threads(args.threads)
    model = load(args.model, torch.device(args.device), getattr(torch, args.dtype))
    work = _work(model.config, args)
    step_runner = None if args.graphs else lambda: run_eagerly
    engine = OvisEngine.from_model(model, make_step_runner=step_runner, eos_token_ids=())
    print(engine.describe(), file=sys.stderr)
    sides: dict[str, Callable[[], list[list[int]]]] = {"engine": lambda: _ours(engine, work)}
    if args.peer:
        peer = _peer(model)
        for size in args.peer_batch:
            sides[f"transformers, batch {size}"] = lambda size=size: _theirs(peer, model, work, size)  # type: ignore[misc]
    if model.device.type == "cuda":
        engine.warm_up()
    _ours(engine, Work(work.requests[:2], [2, 2]))
    before = engine.stats
    rounds = [{name: _timed(side) for name, side in sides.items()} for _ in range(args.rounds)]
    tell(report(rounds, model, engine.stats - before, work))


def _parse() -> argparse.Namespace:
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
    parser.add_argument("--ranks", type=int, default=0, help="tensor-parallel processes; also 1, to start NCCL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="also run transformers")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[8, 32], help="batch sizes (default 8 32)")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs, on CUDA")
    parser.add_argument("--pipeline", action="store_true", help="the whole job over files, not the engine alone")
    return parser.parse_args()


def load(name: str, device: torch.device, dtype: torch.dtype) -> Ovis:
    """With the norm that transformers adds to the tower, so that both compute the same."""
    if name not in SHAPES:
        return load_model(fetch_checkpoint(name), device=device, dtype=dtype, post_trunk_norm=True)
    return _random_model(SHAPES[name], device, dtype, ALONE)


def _random_model(config: OvisConfig, device: torch.device, dtype: torch.dtype, shard: Shard) -> Ovis:
    model = empty_model(config, device=device, dtype=dtype, post_trunk_norm=True, shard=shard)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.05, generator=generator)
    return model


def _work(config: OvisConfig, args: argparse.Namespace) -> Work:
    rng = np.random.default_rng(args.seed)
    lengths = np.exp(rng.normal(math.log(args.output_median), 0.6, args.rows)).clip(1, args.output_cap)
    pictures = _pictures(args.image_size, args.rows, args.seed)
    begun_s = time.perf_counter()
    requests = [_request(config, rng, picture, args.max_tiles) for picture in pictures]
    return Work(requests, lengths.astype(int).tolist(), time.perf_counter() - begun_s)


def _pictures(size: str, count: int, seed: int) -> Iterator[Image.Image]:
    """Coarse noise of `size`, "640x480", made larger."""
    rng = np.random.default_rng(seed)
    width, height = map(int, size.split("x"))
    for _ in range(count):
        yield Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))


def _request(config: OvisConfig, rng: np.random.Generator, picture: Image.Image, max_tiles: int) -> Request:
    side = config.vision.image_size
    tiles, sizes = tile_image(picture, max_tiles, side)
    image = expand_atoms(image_placeholders(choose_grid(*picture.size, max_tiles, side)), config.vision.tokens_per_tile)
    text = rng.integers(0, config.language.vocab_size // 2, NUM_TEXT_TOKENS, dtype=np.int32)
    return Request(np.concatenate([text[:12], image, text[12:]]).astype(np.int32), tiles, sizes)


def _ours(engine: OvisEngine, work: Work) -> list[list[int]]:
    params = [SamplingParams(max_new_tokens=length) for length in work.lengths]
    return [completion.output_ids.tolist() for completion in engine.generate(work.requests, params)]


def _run_rank(rank: int, meeting_point: Path, args: argparse.Namespace) -> None:
    """One of `--ranks`; rank 0 prints."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    with joined(rank, args.ranks, meeting_point, lambda: None) as shard:
        model = _random_model(SHAPES[args.model], torch.device(args.device), getattr(torch, args.dtype), shard)
        work = _work(model.config, args)
        engine = OvisEngine.from_model(model, eos_token_ids=())
        _ours(engine, Work(work.requests[:2], [2, 2]))  # warm
        before = engine.stats
        timing = _timed(lambda: _ours(engine, work))
        stats = engine.stats - before
        exchange_us = {f"[{tokens}, hidden_size]": _exchange_us(model, tokens) for tokens in (1, 64, 8192)}
    if rank == 0:
        result = {
            "ranks": args.ranks,
            "images_per_s": len(work.requests) / timing.wall_s,
            "output_tokens_per_s": sum(work.lengths) / timing.wall_s,
            "seconds": {part: getattr(stats, f"{part}_s") for part in ("vision", "prefill", "decode")},
            "weights_gb": sum(p.numel() * p.itemsize for p in model.parameters()) / 1e9,
            "exchange_us": exchange_us,
        }
        print(json.dumps(result))
    leave()


def _exchange_us(model: Ovis, tokens: int, times: int = 20) -> float:
    """Of one sum over the ranks, of which a pass has two a layer. With one rank: what starting it costs."""
    x = torch.zeros(tokens, model.config.language.hidden_size, device=model.device, dtype=model.dtype)
    torch.distributed.all_reduce(x)
    float(x[0, 0])
    started_s = time.perf_counter()
    for _ in range(times):
        torch.distributed.all_reduce(x)
    float(x[0, 0])  # waits for the device
    return (time.perf_counter() - started_s) / times * 1e6


def _peer(model: Ovis) -> Any:
    """transformers' Ovis2 over the very same weights."""
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


def _theirs(peer: Any, model: Ovis, work: Work, batch_size: int) -> list[list[int]]:
    outputs: list[list[int]] = []
    for start in range(0, len(work.requests), batch_size):
        requests, lengths = work.requests[start : start + batch_size], work.lengths[start : start + batch_size]
        ids = torch.stack([_peer_ids(request, peer.config) for request in requests]).to(model.device)  # of one length
        pixels = torch.cat([_pixels(model, request) for request in requests])
        with torch.inference_mode():
            out = peer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=max(lengths),
                eos_token_id=None,
                pad_token_id=0,
            )
        new = out[:, ids.shape[1] :].tolist()
        outputs += [row[:length] for row, length in zip(new, lengths, strict=True)]
    return outputs


def _peer_ids(request: Request, config: Any) -> Tensor:
    """transformers gives the placeholders ids of its own."""
    ids = request.input_ids.astype(np.int64)
    at = request.input_ids <= IMAGE_START_ID
    ids[at] = np.array(config.visual_indicator_token_ids)[IMAGE_START_ID - request.input_ids[at]]
    ids[request.input_ids == IMAGE_ATOM_ID] = config.image_token_id
    return torch.from_numpy(ids)


def _pixels(model: Ovis, request: Request) -> Tensor:
    tiles, sizes = torch.from_numpy(request.tiles), torch.from_numpy(request.tile_sizes)
    return model.normalize(tiles.to(model.device), sizes.to(model.device)).to(model.dtype)


def _timed(side: Callable[[], list[list[int]]]) -> Timing:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    outputs = side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.process_time() - cpu_s, time.perf_counter() - wall_s, outputs)


def report(rounds: list[dict[str, Timing]], model: Ovis, stats: Stats, work: Work) -> dict[str, Any]:
    """Medians of the rounds: each side, where the engine's time went, and what no engine could save."""
    ours = rounds[0]["engine"].outputs
    sides = {name: _side([r[name] for r in rounds], ours) for name in rounds[0]}
    wall_s = sum(r["engine"].wall_s for r in rounds) / len(rounds)
    busy_s = {part: getattr(stats, f"{part}_s") / len(rounds) for part in ("vision", "prefill", "decode")}
    seconds = {"preprocess": work.preprocess_s, **busy_s, "idle": wall_s - sum(busy_s.values())}
    most = ceilings(model.device, model.pass_dtype)
    first, slots = work.requests[0], max(1, stats.slot_steps // max(1, stats.steps))
    needed = cost(
        model.config,
        model.dtype,
        tiles=len(first.tiles),
        prompt=len(first.input_ids),
        lengths=work.lengths,
        slots=slots,
    )
    return {
        "sides": sides,
        "ratio": _least(sides, "cpu_s_per_image"),
        "wall_ratio": _least(sides, "wall_s_per_image"),
        "seconds": seconds,
        "slots": slots,
        "slot_occupancy": stats.row_steps / max(1, stats.slot_steps),
        "peak_memory_gb": _peak_memory_gb(model.device),
        "tflops_ceiling": most.flops_per_s / 1e12,
        "gb_per_s_ceiling": most.bytes_per_s / 1e9,
        "floor_s": needed.seconds(most),
        "floor_ratio": wall_s / needed.seconds(most),
        "flops_share_of_vision_and_prefill": (needed.vision_flops + needed.prefill_flops)
        / (busy_s["vision"] + busy_s["prefill"])
        / most.flops_per_s,
        "bandwidth_share_of_decode": needed.decode_bytes / max(busy_s["decode"], 1e-9) / most.bytes_per_s,
        **_where(model),
    }


def _side(timings: Sequence[Timing], ours: list[list[int]]) -> dict[str, float]:
    rows, tokens = len(ours), sum(map(len, ours))
    wall_s = statistics.median(t.wall_s for t in timings)
    return {
        "cpu_s_per_image": statistics.median(t.cpu_s for t in timings) / rows,
        "wall_s_per_image": wall_s / rows,
        "images_per_s": rows / wall_s,
        "output_tokens_per_s": tokens / wall_s,
        "equal_rows": sum(a == b for a, b in zip(ours, timings[0].outputs, strict=True)),
    }


def _least(sides: dict[str, dict[str, float]], figure: str) -> float | None:
    """Of transformers' sides, over the engine's; None if there is none."""
    theirs = [side[figure] for name, side in sides.items() if name != "engine"]
    return min(theirs) / sides["engine"][figure] if theirs else None


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _where(model: Ovis) -> dict[str, str]:
    """Device, type and commit that the figures are of."""
    cuda = model.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {"hardware": name, "dtype": str(model.dtype), "torch": torch.__version__, "commit": git.stdout.strip()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def tell(result: dict[str, Any]) -> None:
    """The report in lines, then as JSON."""
    print(f"{result['hardware']}, {result['dtype']}, commit {result['commit']}")
    for name, side in result["sides"].items():
        print(
            f"{name:24} {side['cpu_s_per_image']:8.4f} CPU s/image {side['images_per_s']:8.2f} images/s "
            f"{side['output_tokens_per_s']:8.1f} tokens/s, {side['equal_rows']} rows as the engine's"
        )
    split = ", ".join(f"{part} {s:.2f} s" for part, s in result["seconds"].items())
    print(f"{split}; slots in use {result['slot_occupancy']:.1%}; {result['peak_memory_gb']:.1f} GB at most")
    print(f"floor {result['floor_s']:.2f} s: the engine takes {result['floor_ratio']:.2f} times as long")
    print(json.dumps(result))


def run_pipeline(args: argparse.Namespace) -> dict[str, Any]:
    """`jobs.caption` over picture files, start included: its last line; CPU time of the driver, not of its actors."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "pictures")
        source.mkdir()
        for number, picture in enumerate(_pictures(args.image_size, args.rows, args.seed)):
            picture.save(source / f"{number:06}.jpg", quality=90)
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
