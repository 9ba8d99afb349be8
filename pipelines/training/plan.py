"""Plan a training run on the cluster: devices, precision, threads, and whether the model fits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ovis_model.wording import count_nouns
from pipelines.cluster.resources import Hardware
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
        threads=max(1, (os.cpu_count() or 1) // config.num_workers),
        num_cpus=max(1, int(hardware.cpus)),
    )


def _choose_device(config: TrainConfig, hardware: Hardware) -> Literal["cpu", "cuda"]:
    if config.device != "auto":
        return config.device
    return "cuda" if hardware.gpus else "cpu"
