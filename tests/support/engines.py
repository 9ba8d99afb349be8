"""Run the engine on golden requests: one engine per checkpoint, its output ids, and logits computed without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from ovis_model.config import Layout
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.types import Request, SamplingParams
from tests.support.golden_data import checkpoint_dir, draw_picture, load_expected

GREEDY = SamplingParams(max_new_tokens=48)
PARAMS = {
    "greedy": GREEDY,
    "penalised": SamplingParams(repetition_penalty=1.3),
    "sampled": SamplingParams(temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.2, seed=1),
    "other seed": SamplingParams(temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.2, seed=2),
    "hot": SamplingParams(temperature=3.0, seed=3),
}


@cache
def load_engine(checkpoint: str, layout: Layout = "aidc") -> OvisEngine:
    return OvisEngine.from_pretrained(str(checkpoint_dir(checkpoint, layout)), device="cpu", dtype="float32")


@cache
def make_golden_requests(checkpoint: str) -> tuple[Request, ...]:
    processor = Processor.from_pretrained(str(checkpoint_dir(checkpoint)))
    return tuple(
        processor.build_request(
            case["query"], [draw_picture(p) for p in case["images"]], max_tiles=case["max_partition"] or 9
        )
        for case in load_expected(checkpoint)["generation"]
    )


def load_greedy_ids(checkpoint: str) -> list[list[int]]:
    return [case["greedy_ids"] for case in load_expected(checkpoint)["generation"]]


def generate_ids(engine: OvisEngine, requests: Sequence[Request], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [completion.output_ids.tolist() for completion in engine.generate(requests, params)]


@cache
def generate_alone(index: int, kind: str) -> list[int]:
    """Return the first 12 tokens of a golden request that runs alone."""
    engine, request = load_engine("tiny56-tied"), make_golden_requests("tiny56-tied")[index]
    return generate_ids(engine, [request], replace(PARAMS[kind], max_new_tokens=12))[0]


@torch.inference_mode()
def compute_logits(model: torch.nn.Module, request: Request) -> torch.Tensor:
    """Return logits [T, vocab], computed without cache and padding."""
    visual = model.encode_tiles(normalize_tiles(model, request)).flatten(0, 1)
    embeds = model.embed(torch.from_numpy(request.input_ids).long(), visual)[None]
    return model(embeds, torch.arange(len(request.input_ids))[None])[0]


def normalize_tiles(model: torch.nn.Module, request: Request) -> torch.Tensor:
    return model.normalize(torch.from_numpy(request.tiles), torch.from_numpy(request.tile_sizes))
