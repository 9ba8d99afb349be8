"""Answer questions with the weights under training, by the engine of inference, to see what they have learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

import numpy as np
import torch
from tokenizers import Tokenizer

from ovis_model.engine.engine import OvisEngine
from ovis_model.engine.scheduler import Budget
from ovis_model.network.ovis import Ovis
from ovis_model.network.weights import allocate_model, find_targets
from ovis_model.tokenizer import detokenize
from ovis_model.training.examples import IGNORED_LABEL, PreferenceExample, TrainingExample
from ovis_model.training.lora import list_merged
from ovis_model.types import Request, SamplingParams

_BUDGET = Budget(kv_tokens=1 << 14, slots=4, vision_tiles=4)  # little: the training fills the memory
_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """A question, the answer in the data and that of the model, as text."""

    question: str
    wanted: str
    answer: str


def copy_for_inference(network: Ovis, device: torch.device, dtype: torch.dtype) -> Ovis:
    """Return a copy of the weights, adapters merged, that the engine takes."""
    model = allocate_model(network.config, device=device, dtype=dtype)
    targets = find_targets(model, "aidc")
    for name, tensor in list_merged(network):
        if name in targets:
            targets[name].fill(tensor)
    return model


def answer_examples(
    model: Ovis, tokenizer: Tokenizer, examples: Sequence[TrainingExample | PreferenceExample]
) -> list[Sample]:
    """Answer the first question of each example greedily."""
    whole = [x.split()[0] if isinstance(x, PreferenceExample) else x for x in examples]
    ends = [int(np.flatnonzero(x.labels != IGNORED_LABEL)[0]) for x in whole]
    requests = [Request(x.input_ids[:end], x.tiles, x.tile_sizes, uuid4()) for x, end in zip(whole, ends, strict=True)]
    with OvisEngine.from_model(model, budget=_BUDGET) as engine:
        completions = engine.generate(requests, SamplingParams(max_new_tokens=_MAX_NEW_TOKENS))
    return [
        Sample(
            _cut_question(detokenize(tokenizer, x.input_ids[:end][x.input_ids[:end] >= 0])),
            detokenize(tokenizer, x.labels[x.labels != IGNORED_LABEL]),
            detokenize(tokenizer, completion.output_ids),
        )
        for x, end, completion in zip(whole, ends, completions, strict=True)
    ]


def _cut_question(prompt: str) -> str:
    """Return what the user says last in a prompt without special tokens."""
    return prompt.rpartition("user\n")[2].removesuffix("assistant\n").strip()
