"""Let several workers train one model: sums of gradients and values, or a model divided between them (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ovis_model.network.ovis import Ovis
from ovis_model.training.lora import LoraConfig, add_adapters
from ovis_model.training.model import TrainingModel

_TIMEOUT = timedelta(minutes=30)  # of one exchange; the slowest worker may read a long video meanwhile
_MAX_BUCKET_NUMBERS = 16 << 20  # gradients that are summed at once: 64 MB in float32


@dataclass(frozen=True)
class World:
    """The place of a worker: `rank` of `size`. A single worker exchanges nothing."""

    rank: int = 0
    size: int = 1

    def sum_values(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums of numbers over all workers."""
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        if self.size > 1:
            dist.all_reduce(sums)
        return [float(x) for x in sums]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their sums over all workers. A parameter without one counts as 0."""
        if self.size == 1:
            return
        for bucket in _fill_buckets(parameters):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, torch.split(flat, [x.numel() for x in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


def _fill_buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield gradients in buckets of limited size; a parameter without gradient gets one of 0."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and sum(x.numel() for x in bucket) + parameter.numel() > _MAX_BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        yield bucket


def open_meeting_point(host: str, size: int) -> Any:
    """Return a store on a free port, at which workers meet; its `port` is to be passed on."""
    return _open_store(host, 0, size, is_master=True, timeout=_TIMEOUT, wait_for_workers=False)


def find_meeting_point(host: str, port: int, size: int) -> Any:
    """Return the store that another worker has opened."""
    return _open_store(host, port, size, is_master=False, timeout=_TIMEOUT)


_open_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch's stubs lack it


@contextmanager
def join_world(world: World, store: Any, device: torch.device) -> Iterator[World]:
    """Join the other workers while in the context; a single one joins nobody."""
    if world.size == 1:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def shard_model(model: TrainingModel, world: World, device: torch.device) -> None:
    """Divide parameters, gradients and the optimizer's state between the workers.

    Each layer and block is gathered while it runs; all else, such as the tables, during a whole pass. Gradients are
    summed, not averaged, because losses are sums.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    network = model.network
    layers = [*network.visual_tokenizer.backbone.trunk.blocks, *network.llm.model.layers]
    for part in (*layers, model):
        fully_shard(part, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for name in ("loss_sum", "compute_logprobs"):
        register_fsdp_forward_method(model, name)


def gather(tensor: Tensor) -> Tensor:
    """Return a whole tensor, also of one that is divided; all workers must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scatter(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this worker's part of a whole tensor if `like` is divided, else the tensor, on the device of `like`."""
    moved = tensor.to(like.device)
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements)


@torch.no_grad()
def gather_network(network: Ovis, world: World, lora: LoraConfig | None = None) -> Ovis | None:
    """Return a whole copy on the CPU of a network that is divided, on rank 0; all workers must call it.

    lora: the network's adapters, None if it has none.
    """
    with torch.device("meta"):
        whole = Ovis(network.config)
        if lora is not None:
            add_adapters(whole, lora)
    if world.rank == 0:
        whole.to_empty(device="cpu")
    parameters = dict(whole.named_parameters())
    for name, parameter in network.named_parameters():
        gathered = gather(parameter.detach())
        if world.rank == 0:
            parameters[name].copy_(gathered)
    return whole if world.rank == 0 else None
