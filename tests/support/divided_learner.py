"""Take steps with a model that two processes share, and gather it again; for comparison with one process."""

from __future__ import annotations

from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import multiprocessing

from ovis_model.training.learning.learner import Learner, LearnerOptions, MicroBatch
from ovis_model.training.learning.parallel import (
    World,
    find_meeting_point,
    gather_network,
    join_world,
    open_meeting_point,
)
from tests.support.training import TINY, make_examples

HOST, SIZE = "127.0.0.1", 2
Result = tuple[list[float], dict[str, Any]]
"""The losses of the steps, and the weights after them."""


def take_steps_together(options: LearnerOptions, num_steps: int) -> Result:
    """Return what the processes come to, of which each has two of the four examples."""
    context = multiprocessing.get_context("spawn")
    meeting, found = open_meeting_point(HOST, SIZE), context.Queue()
    processes = [
        context.Process(target=_work, args=(rank, meeting.port, options, num_steps, found)) for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    result: Result = found.get(timeout=300)
    for process in processes:
        process.join()
    return result


def take_steps(learner: Learner, examples: list[Any], num_steps: int) -> list[float]:
    """Return the loss of each step."""
    return [learner.step([MicroBatch(examples)])["loss"] for _ in range(num_steps)]


def _work(rank: int, port: int, options: LearnerOptions, num_steps: int, found: Queue[Result]) -> None:
    torch.set_num_threads(1)
    world = World(rank, SIZE)
    with join_world(world, find_meeting_point(HOST, port, SIZE), torch.device("cpu")):
        learner = Learner(TINY, options, torch.device("cpu"), world)
        losses = take_steps(learner, make_examples()[2 * rank : 2 * rank + 2], num_steps)
        network = gather_network(learner.network, world, options.lora)
        if network is not None:
            found.put((losses, {name: x.detach().numpy() for name, x in network.named_parameters()}))
