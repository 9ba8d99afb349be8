"""Plan a training run on the cluster: devices, precision, threads, and whether the model fits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.training.memory import TrainingMemory, estimate_training_memory
from ovis_model.wording import count_nouns
from pipelines.cluster.resources import Hardware, query_gpu_memory_bytes
from pipelines.errors import ResourceError
from pipelines.training.config import TrainConfig


@dataclass(frozen=True)
class TrainingPlan:
    """Where the workers run.

    cpus_per_worker: what each reserves in Ray. threads: of torch in a worker on CPUs. num_cpus: of the cluster.
    """

    device: Literal["cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    num_workers: int
    cpus_per_worker: float
    threads: int
    num_cpus: int

    @property
    def device_bytes(self) -> int:
        """Memory of a worker: that of the smallest GPU, or its share of this machine's."""
        if self.device == "cuda":
            return query_gpu_memory_bytes()
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.num_workers

    def __str__(self) -> str:
        """Format the plan as one line for the log."""
        share = "1 GPU" if self.device == "cuda" else f"{count_nouns(self.threads, 'thread')} on CPUs"
        return f"plan: {count_nouns(self.num_workers, 'worker')} (each: {share}), {self.precision}"


def plan_training(config: TrainConfig, hardware: Hardware) -> TrainingPlan:
    """Plan the workers. Raise ResourceError if the cluster is too small."""
    device = _choose_device(config, hardware)
    num_gpus = sum(hardware.gpus)
    if device == "cuda" and config.num_workers > num_gpus:
        raise ResourceError(f"--num-workers {config.num_workers} needs as many GPUs; the cluster has {num_gpus}")
    if hardware.cpus <= 0:
        raise ResourceError("the cluster has no CPU to prepare rows with; give Ray at least one")
    dtype = ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    return TrainingPlan(
        device=device,
        precision=dtype,
        num_workers=config.num_workers,
        cpus_per_worker=min(1.0, int(hardware.cpus / config.num_workers * 100) / 100),
        threads=max(1, _count_cpus() // config.num_workers),
        num_cpus=max(1, int(hardware.cpus)),
    )


def _count_cpus() -> int:
    """Return the number of CPUs that this process may use; macOS says only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(config: TrainConfig, plan: TrainingPlan, num_tokens: int, num_tiles: int) -> TrainingMemory:
    """Estimate the memory of a worker for micro-batches of this size. Raise TrainingMemoryError if it is too small."""
    model = OvisConfig.from_directory(fetch_checkpoint(config.model, config.revision, weights=False))
    memory = estimate_training_memory(
        model,
        config.parts,
        num_tokens=num_tokens,
        num_tiles=num_tiles,
        lora_rank=config.lora_rank,
        precision=plan.precision,
        num_shards=config.num_workers if config.fsdp else 1,
    )
    memory.check_fits(plan.device_bytes)
    return memory


def describe_memory(memory: TrainingMemory, plan: TrainingPlan) -> str:
    """Return the estimate as one line for the log."""
    needed, device, states = (x / 1e9 for x in (memory.total, plan.device_bytes, memory.states))
    trained, frozen = memory.num_trained / 1e6, memory.num_frozen / 1e6
    return (
        f"memory: {needed:.2f} of {device:.1f} GB per worker, {states:.2f} of them for weights and optimizer; "
        f"{trained:,.1f} M parameters are trained, {frozen:,.1f} M are frozen"
    )


def _choose_device(config: TrainConfig, hardware: Hardware) -> Literal["cpu", "cuda"]:
    if config.device != "auto":
        return config.device
    return "cuda" if hardware.gpus else "cpu"
