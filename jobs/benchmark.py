"""The engine beside transformers' padded `generate`, on the same rows with the same weights, taking turns.

    python -m jobs.benchmark --model demo
    python -m jobs.benchmark --model 24x128 --rows 96
    python -m jobs.benchmark --model 1B --dtype bfloat16 --rows 8 --image-size 448x448 --output-median 32
    python -m jobs.benchmark --model 34B --device cuda --dtype bfloat16 --ranks 1     (or 2, 4, 8: a GPU each)

`--model` is a checkpoint, or a shape with random weights: 1B 2B 4B 8B 16B 34B, or 24x128 (24 layers of width 128, where
the cost of a step is everything but arithmetic). Answers end after a drawn number of tokens, log-normal, not at an
end-of-text id. Transformers gets its best batch size of those tried. With `--ranks` the engine runs alone, over that
many processes, and what an exchange between them takes is told; the model is a shape then. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import NUM_INDICATORS, SIZES, LanguageConfig, OvisConfig, VisionConfig
from ovis_model.engine import OvisEngine, Stats
from ovis_model.model import Ovis
from ovis_model.parallel import ALONE, Shard, joined
from ovis_model.prompt import expand_atoms, image_placeholders
from ovis_model.tiling import choose_grid, num_tiles
from ovis_model.types import IMAGE_ATOM_ID, IMAGE_START_ID, Request, SamplingParams
from ovis_model.weights import empty_model, load_model, tensor_targets

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
NUM_TEXT_TOKENS = 37
"""Of a prompt beside the image: "Describe the image." in Qwen's chat format is about as long."""


@dataclass(frozen=True)
class Work:
    """Rows and how many tokens each is to get."""

    requests: list[Request]
    lengths: list[int]


@dataclass(frozen=True)
class Timing:
    cpu_s: float
    wall_s: float
    outputs: list[list[int]]


def main() -> None:
    args = _parse()
    if args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            spawn(_run_rank, (Path(directory) / "meeting_point", args), nprocs=args.ranks)  # type: ignore[no-untyped-call]
        return
    torch.set_num_threads(args.threads)
    model = load(args.model, torch.device(args.device), getattr(torch, args.dtype))
    work = _work(model.config, args)
    engine = OvisEngine(model)
    engine.config = replace(engine.config, eos_token_ids=())
    sides: dict[str, Callable[[], list[list[int]]]] = {"engine": lambda: _ours(engine, work)}
    if args.peer:
        peer = _peer(model)
        for size in args.peer_batch:
            sides[f"transformers, batch {size}"] = lambda size=size: _theirs(peer, model, work, size)  # type: ignore[misc]
    _ours(engine, Work(work.requests[:2], [2, 2]))  # warm
    engine.stats = Stats()
    rounds = [{name: _timed(side) for name, side in sides.items()} for _ in range(args.rounds)]
    report(rounds, engine.stats, work, model, args.rounds)


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
    width, height = map(int, args.image_size.split("x"))
    grid = choose_grid(width, height, args.max_tiles, config.vision.image_size)
    image = expand_atoms(image_placeholders(grid), config.vision.tokens_per_tile)
    lengths = np.exp(rng.normal(math.log(args.output_median), 0.6, args.rows)).clip(1, args.output_cap)
    return Work([_request(config, rng, image, num_tiles(grid)) for _ in range(args.rows)], lengths.astype(int).tolist())


def _request(config: OvisConfig, rng: np.random.Generator, image: Any, tiles: int) -> Request:
    side = config.vision.image_size
    text = rng.integers(0, config.language.vocab_size // 2, NUM_TEXT_TOKENS, dtype=np.int32)
    ids = np.concatenate([text[:12], image, text[12:]]).astype(np.int32)
    pixels = rng.integers(0, 256, (tiles, 3, side, side), dtype=np.uint8)
    return Request(ids, pixels, np.full((tiles, 2), side, np.int32))


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
        engine = OvisEngine(model)
        engine.config = replace(engine.config, eos_token_ids=())
        _ours(engine, Work(work.requests[:2], [2, 2]))  # warm
        engine.stats = Stats()
        timing = _timed(lambda: _ours(engine, work))
        exchange_us = {f"[{tokens}, hidden_size]": _exchange_us(model, tokens) for tokens in (1, 64, 8192)}
    if rank == 0:
        result = {
            "ranks": args.ranks,
            "images_per_s": len(work.requests) / timing.wall_s,
            "output_tokens_per_s": sum(work.lengths) / timing.wall_s,
            "seconds": {part: getattr(engine.stats, f"{part}_s") for part in ("vision", "prefill", "decode")},
            "weights_gb": sum(p.numel() * p.itemsize for p in model.parameters()) / 1e9,
            "exchange_us": exchange_us,
        }
        print(json.dumps(result))


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
    peer.load_state_dict(tensor_targets(model, "native"), strict=False, assign=True)
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
    return model.normalize(tiles.to(model.device), sizes.to(model.device))


def _timed(side: Callable[[], list[list[int]]]) -> Timing:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    outputs = side()
    return Timing(time.process_time() - cpu_s, time.perf_counter() - wall_s, outputs)


def report(rounds: list[dict[str, Timing]], stats: Stats, work: Work, model: Ovis, num_rounds: int) -> None:
    """Medians of the rounds, where the engine's time went, and one JSON line."""
    num_rows, num_tokens = len(work.requests), sum(work.lengths)
    medians = {name: statistics.median(r[name].cpu_s for r in rounds) for name in rounds[0]}
    walls = {name: statistics.median(r[name].wall_s for r in rounds) for name in rounds[0]}
    print(f"{num_rows} rows, {num_tokens} output tokens, {model.dtype}, {model.device}, medians of {num_rounds} rounds")
    for name, cpu_s in medians.items():
        rates = f"{num_rows / walls[name]:8.2f} images/s  {num_tokens / walls[name]:8.1f} tokens/s"
        print(f"{name:24} {cpu_s / num_rows:8.4f} CPU s/image  {rates}  {cpu_s / medians['engine']:5.2f} x the engine")
    ours = rounds[0]["engine"].outputs
    equal = {name: sum(a == b for a, b in zip(ours, t.outputs, strict=True)) for name, t in rounds[0].items()}
    busy_s = {part: getattr(stats, f"{part}_s") / num_rounds for part in ("vision", "prefill", "decode")}
    occupancy = stats.row_steps / max(1, stats.slot_steps)
    floor = floor_s(model, work)
    print(f"equal rows: {equal}; seconds of the engine: {busy_s}; slots in use {occupancy:.1%}; floor {floor:.2f} s")
    result = {
        "cpu_s_per_image": {name: cpu_s / num_rows for name, cpu_s in medians.items()},
        "images_per_s": num_rows / walls["engine"],
        "output_tokens_per_s": num_tokens / walls["engine"],
        "ratio": min((s for name, s in medians.items() if name != "engine"), default=math.nan) / medians["engine"],
        "seconds": busy_s,
        "slot_occupancy": occupancy,
        "equal_rows": equal,
        "floor_s": floor,
        "floor_ratio": walls["engine"] / floor,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(json.dumps(result))


def floor_s(model: Ovis, work: Work) -> float:
    """Seconds that the matrix products alone take at the best rate that this device gives a large one now."""
    flops = _flops(model.config, work)
    side = 2048
    a = torch.randn(side, side, device=model.device).to(model.dtype)
    a @ a
    seconds = []
    for _ in range(5):
        started_s = time.perf_counter()
        a @ a
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_s)
    return flops / (2 * side**3 / min(seconds))


def _flops(config: OvisConfig, work: Work) -> float:
    """Two for each multiply-add: of weights by tokens, and of queries by keys and weights by values."""
    v, t = config.vision, config.language
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size + 2 * v.num_patches * v.hidden_size
    merged = v.hidden_size * v.hidden_stride**2
    head = v.tokens_per_tile * v.num_visual_words * (merged + t.hidden_size)
    tile = v.num_patches * (v.num_hidden_layers * block + 3 * v.patch_size**2 * v.hidden_size) + head
    kv_size = t.num_key_value_heads * t.head_dim
    layer = 2 * t.hidden_size**2 + 2 * t.hidden_size * kv_size + 3 * t.hidden_size * t.intermediate_size
    prompt = len(work.requests[0].input_ids)
    total = len(work.requests) * len(work.requests[0].tiles) * tile
    for length in work.lengths:
        tokens = prompt + length
        total += tokens * t.num_hidden_layers * (layer + tokens * t.hidden_size) + length * t.hidden_size * t.vocab_size
    return 2.0 * total


if __name__ == "__main__":
    main()
