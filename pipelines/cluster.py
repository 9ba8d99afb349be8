"""The Ray that a run uses, and how its CPUs, GPUs and rows are shared between the pools of actors."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ovis_model.types import ROWS_SIDE_BY_SIDE
from pipelines.config import CaptionConfig
from pipelines.manifest import ROWS_PER_GROUP

BATCH_BYTES = 64 << 20  # of tiles that are handed on at once: a small share of any object store

PREPROCESSORS_PER_GPU = 12  # one core prepares about 12 full-HD images a second, a GPU takes many more
_CPUS_PER_CPU_REPLICA = 8

_LOCAL = {
    "address": "local",
    "num_cpus": max(2, os.cpu_count() or 2),
    "include_dashboard": False,
    "logging_level": logging.CRITICAL,
    "log_to_driver": False,
}


class ResourceError(ValueError):
    """The cluster cannot hold the run, and what to do about it."""


@dataclass(frozen=True)
class Pools:
    """Actors and what each reserves. Together they never ask for more than there is: a pool that cannot start waits
    for ever (ray-project/ray#44687)."""

    device: Literal["cpu", "cuda"]
    num_replicas: int
    replica_cpus: float
    replica_gpus: int
    num_preprocessors: int
    preprocessor_cpus: float

    @property
    def cpus(self) -> float:
        return self.num_replicas * self.replica_cpus + self.num_preprocessors * self.preprocessor_cpus

    @property
    def threads_per_replica(self) -> int:
        return max(1, int(self.replica_cpus))


def plan_pools(config: CaptionConfig, *, cpus: float, gpus: float) -> Pools:
    """Raises ResourceError if the cluster has too few CPUs or GPUs for what was asked."""
    device = config.device if config.device != "auto" else "cuda" if gpus >= 1 else "cpu"
    if cpus <= 0:
        raise ResourceError("the cluster has no CPUs to decode images with; give Ray at least one")
    num_replicas = _num_replicas(config, device, cpus, gpus)
    wanted = max(1, (cpus * 3 / 4) // num_replicas) if device == "cpu" else 1
    # At least half of a small cluster's CPUs stay with the preprocessors.
    replica_cpus = _share(wanted, cpus * (3 / 4 if cpus >= 4 else 1 / 2), num_replicas)
    left = cpus - replica_cpus * num_replicas
    num_preprocessors = _num_preprocessors(config, device, left, num_replicas)
    return Pools(
        device=device,
        num_replicas=num_replicas,
        replica_cpus=replica_cpus,
        replica_gpus=1 if device == "cuda" else 0,
        num_preprocessors=num_preprocessors,
        preprocessor_cpus=_share(1, left, num_preprocessors),
    )


def _num_replicas(config: CaptionConfig, device: str, cpus: float, gpus: float) -> int:
    if device == "cpu":
        return max(1, int(cpus // _CPUS_PER_CPU_REPLICA)) if config.num_replicas == "auto" else config.num_replicas
    if gpus < 1:
        raise ResourceError("device=cuda, but the cluster has no GPU; use --device cpu or add a GPU node")
    wanted = int(gpus) if config.num_replicas == "auto" else config.num_replicas
    if wanted > gpus:
        raise ResourceError(f"{wanted} replicas need {wanted} GPUs, the cluster has {gpus:g}; lower --num-replicas")
    return wanted


def _num_preprocessors(config: CaptionConfig, device: str, cpus: float, num_replicas: int) -> int:
    if config.num_preprocessors != "auto":
        return config.num_preprocessors
    most = PREPROCESSORS_PER_GPU * num_replicas if device == "cuda" else int(cpus)
    return max(1, min(int(cpus), most))


def _share(wanted: float, cpus: float, actors: int) -> float:
    """CPUs for each of `actors`: as many as wanted or an equal part of what there is, in Ray's steps of 1e-4."""
    part = min(wanted, cpus / actors)
    return int(part) if part >= 1 else int(part * 10_000) / 10_000


@dataclass(frozen=True)
class Sizes:
    """`rows_per_unit`: what a preprocessor takes at once; `calls_per_replica`: batches that its engine mixes."""

    rows_per_unit: int
    rows_per_batch: int
    calls_per_replica: int


def plan_batches(num_rows: int, pools: Pools, *, most_tile_bytes: int) -> Sizes:
    """Batches of at most BATCH_BYTES, enough of them at once that a replica never runs dry at the end of one.

    Many units, so that every actor has work early and late; few enough for the driver to hold (about 20,000).
    """
    fair_share = num_rows // (16 * pools.num_preprocessors)
    rows_per_unit = max(_power_of_two(min(fair_share, 64)), _power_of_two(num_rows // 20_000), 8)
    rows_per_batch = max(4, min(32, num_rows // (8 * pools.num_replicas), BATCH_BYTES // most_tile_bytes))
    return Sizes(min(rows_per_unit, ROWS_PER_GROUP), rows_per_batch, 1 + -(-ROWS_SIDE_BY_SIDE // rows_per_batch))


def _power_of_two(number: int) -> int:
    """The largest one up to `number`, so that units fit into the row groups of the manifest."""
    return 1 << max(0, number.bit_length() - 1)


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of a submitted job, else start one on this machine and end it afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # For the local cluster's processes: see generate.load_engine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Or each pool's start prints an error about arguments that are far too small to be evicted (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():  # by a program that calls us
        yield
        return
    with _own_sigterm_handler():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", logging_level=logging.WARNING)
        else:
            ray.init(**_LOCAL)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Ray puts a handler of its own in place, which prints a stack and ends the process with code 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def last_line(error: Exception) -> str:
    """Of a remote trace: the exception's type and message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Died)\b", line)), lines[-1])


def configure_ray_data() -> None:
    """For the datasets that this process runs."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows
    context.target_max_block_size = BATCH_BYTES
    # Half an hour without a block fails a run by default: less than a large model may need to load.
    context.execution_no_progress_timeout_s = 4 * 3600
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # What an actor raises is told once, by us, and not with a request to open an issue at Ray's.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.operators.actor_pool_map_operator"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that its bars are off
