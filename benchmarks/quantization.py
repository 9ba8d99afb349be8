"""Compare the answers in bfloat16 and in FP8 with those in float32.

    python -m benchmarks.quantization [--model demo] [--images 200]

Both are simulated on the CPU as a GPU computes them: all activations in bfloat16, products of FP8 summed in float32.
Errors are root-mean-square differences over the root mean square in float32. Each model predicts every token of the
answers that float32 gives, so a token counts as equal whatever came before it. The last two columns are the demo's:
captions and answers of held-out drawings that are exactly right, when each model generates for itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from demo.drawings import make_picture
from demo.questions import CAPTION_PROMPT
from demo.skills import mark_answers
from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import Quantization
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.network import layers
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import load_model
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Request, SamplingParams

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Accuracy:
    """One line of the table; shares and errors are in percent."""

    weights: str
    visual_error: float
    logit_error: float
    equal_tokens: float
    equal_answers: float
    right: dict[str, str]


@dataclass(frozen=True)
class Answered:
    """A request, the answer that float32 gives, and visual embeddings and logits of all tokens of that answer."""

    request: Request
    ids: Sequence[int]
    visual: Tensor
    logits: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="directory or hub id")
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    found = compare(args.model, args.images)
    for line in found:
        right = ", ".join(f"{kind} {count}" for kind, count in line.right.items())
        print(
            f"{line.weights:9} visual error {line.visual_error:5.2f} %  logit error {line.logit_error:5.2f} %  equal "
            f"tokens {line.equal_tokens:6.2f} %  equal answers {line.equal_answers:6.2f} %  right: {right or '-'}"
        )
    print(json.dumps([asdict(line) for line in found]))


def compare(name: str, num_images: int) -> list[Accuracy]:
    """Return the accuracy of float32, bfloat16 and FP8, in this order."""
    processor = Processor.from_pretrained(name)
    requests = [
        processor.build_request(CAPTION_PROMPT, [make_picture(seed, held_out=True)[0]]) for seed in range(num_images)
    ]
    exact = _load(name, torch.float32)
    answers = [_compute(exact, request, ids) for request, ids in zip(requests, _generate(exact, requests), strict=True)]
    with mock.patch.object(layers, "_is_slow_in_bfloat16", lambda: False):  # on a GPU, passes are in bfloat16
        models = {
            "float32": exact,
            "bfloat16": _load(name, torch.bfloat16),
            "fp8": _load(name, torch.bfloat16, "fp8"),
        }
        return [_measure(label, model, answers, processor, name) for label, model in models.items()]


def _load(name: str, dtype: torch.dtype, quantization: Quantization = "none") -> Ovis:
    directory = fetch_checkpoint(name)
    return load_model(directory, device=torch.device("cpu"), dtype=dtype, quantization=quantization)


def _generate(model: Ovis, requests: Sequence[Request]) -> list[list[int]]:
    with OvisEngine.from_model(model) as engine:
        completions = engine.generate(requests, SamplingParams(max_new_tokens=MAX_NEW_TOKENS))
    return [completion.output_ids.tolist() for completion in completions]


@torch.inference_mode()
def _compute(model: Ovis, request: Request, ids: Sequence[int]) -> Answered:
    """Compute the logits of an answer in one pass over prompt and answer."""
    pixels = model.normalize(torch.from_numpy(request.tiles), torch.from_numpy(request.tile_sizes))
    visual = model.encode_tiles(pixels).flatten(0, 1)
    tokens = torch.from_numpy(np.concatenate([request.input_ids, ids[:-1]])).long()
    logits = model(model.embed(tokens, visual)[None], torch.arange(len(tokens))[None])[0]
    return Answered(request, ids, visual.float(), logits[-len(ids) :].float())


def _measure(label: str, model: Ovis, wanted: Sequence[Answered], processor: Processor, name: str) -> Accuracy:
    found = [_compute(model, answer.request, answer.ids) for answer in wanted]
    generated = _generate(model, [answer.request for answer in wanted])
    ours, theirs = (torch.cat([answer.logits for answer in side]).argmax(-1) for side in (found, wanted))
    is_equal = [ids == answer.ids for ids, answer in zip(generated, wanted, strict=True)]
    right: dict[str, str] = {}
    if name == "demo":
        with OvisEngine.from_model(model, tokenizer=load_tokenizer(fetch_checkpoint(name))) as engine:
            marks = mark_answers(engine, processor, len(wanted))
            right = {skill: f"{sum(right)}/{len(right)}" for skill, right in marks.items()}
    return Accuracy(
        label,
        100 * _compare([answer.visual for answer in found], [answer.visual for answer in wanted]),
        100 * _compare([answer.logits for answer in found], [answer.logits for answer in wanted]),
        100 * float((ours == theirs).float().mean()),
        100 * sum(is_equal) / len(is_equal),
        right,
    )


def _compare(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    ours, theirs = torch.cat(list(found)), torch.cat(list(wanted))
    return float((ours - theirs).norm() / theirs.norm())


if __name__ == "__main__":
    main()
