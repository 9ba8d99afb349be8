"""Eight tasks about each golden set of pictures, and the answer of each task when it runs alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ovis_model.inputs.processor import Processor
from ovis_model.types import Completion, Request, SamplingParams
from tests.support.engines import PARAMS, load_engine
from tests.support.golden_data import checkpoint_dir, draw_picture, load_expected

END = 564
CHOICES = ((17, END), (5, 301, 22, END), (9, 8, END), (END,))
CHOICE = SamplingParams(choices=CHOICES)
TASKS: tuple[tuple[str, str | None, SamplingParams], ...] = (
    ("Describe the image.", None, PARAMS["greedy"]),
    ("Is there a red object?", None, replace(CHOICE, choices=CHOICES[:2])),
    ("How many objects are there? Answer with a number and nothing else.", None, PARAMS["penalised"]),
    ("Which shape is it?", None, CHOICE),
    ("Tags, please.", None, PARAMS["sampled"]),
    ("", None, replace(CHOICE, temperature=1.5, seed=4)),
    ("Describe the image.", "You are terse.", PARAMS["hot"]),
    ("Is it large?", "You are terse.", CHOICE),
)


@cache
def make_items(checkpoint: str) -> tuple[tuple[Request, ...], ...]:
    """Return the tasks of each golden set of pictures as one group of requests; the last group has no picture."""
    processor = Processor.from_pretrained(str(checkpoint_dir(checkpoint)))
    cases = [case for case in load_expected(checkpoint)["generation"] if case["images"]]
    items = []
    sets = [([draw_picture(image) for image in case["images"]], case["max_partition"]) for case in cases]
    for pictures, max_tiles in [*sets, ([], 1)]:
        requests = [processor.build_request(text, pictures, max_tiles, system) for text, system, _ in TASKS]
        items.append(tuple(replace(request, group=len(items)) for request in requests))
    return tuple(items)


@cache
def generate_alone(checkpoint: str, item: int, task: int) -> Completion:
    [completion] = load_engine(checkpoint).generate([make_items(checkpoint)[item][task]], make_params(task))
    return completion


def make_params(task: int) -> SamplingParams:
    return replace(TASKS[task][2], max_new_tokens=3 + task)


def assert_same(found: Completion, wanted: Completion) -> None:
    assert found.output_ids.tolist() == wanted.output_ids.tolist()
    assert found.finish_reason == wanted.finish_reason
    assert found.mean_logprob == pytest.approx(wanted.mean_logprob, abs=1e-4)
    assert (found.choice_probs is None) == (wanted.choice_probs is None)
    if wanted.choice_probs is not None:
        np.testing.assert_allclose(found.choice_probs, wanted.choice_probs, atol=1e-4, rtol=0)
