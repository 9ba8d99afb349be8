"""The Ray that a run uses, and how its CPUs, GPUs and rows are shared between the pools of actors."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from ovis_model.types import ROWS_SIDE_BY_SIDE
from pipelines.config import CaptionConfig
from pipelines.manifest import ROWS_PER_GROUP

BATCH_BYTES = 64 << 20  # of tiles that are handed on at once: a small share of any object store

PREPROCESSORS_PER_GPU = 12  # one core prepares about 12 full-HD images a second, a GPU takes many more
_CPUS_PER_CPU_REPLICA = 8
MAX_BLOCKS = 20_000  # of units: the driver holds an object for each

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
    """Actors and what each reserves: never more than one CPU, so that any node can hold any of them, and together
    never more than there is. A pool that cannot start waits for ever (ray-project/ray#44687)."""

    device: Literal["cpu", "cuda"]
    num_replicas: int
    replica_cpus: float
    replica_gpus: int
    threads_per_replica: int
    num_preprocessors: int
    preprocessor_cpus: float


def plan_pools(config: CaptionConfig, *, cpus: float, gpus: float) -> Pools:
    """For a cluster of so many CPUs and GPUs. Raises ResourceError if it has too few for what was asked."""
    if cpus <= 0:
        raise ResourceError("the cluster has no CPUs to decode images with; give Ray at least one")
    if config.device == "cuda" or (config.device == "auto" and gpus >= 1):
        return _gpu_pools(config, cpus, gpus)
    return _cpu_pools(config, cpus)


def _gpu_pools(config: CaptionConfig, cpus: float, gpus: float) -> Pools:
    if gpus < 1:
        raise ResourceError("device=cuda, but the cluster has no GPU; use --device cpu or add a GPU node")
    replicas = int(gpus) if config.num_replicas == "auto" else config.num_replicas
    if replicas > gpus:
        raise ResourceError(f"{replicas} replicas need {replicas} GPUs, the cluster has {gpus:g}; lower --num-replicas")
    spare = max(1, int(cpus) - replicas)  # a replica's own thread keeps a core busy
    preprocessors = _chosen(config.num_preprocessors, min(spare, PREPROCESSORS_PER_GPU * replicas))
    # A replica reserves no CPU: preprocessors that took all those of a GPU's node would keep it from starting.
    return Pools("cuda", replicas, 0, 1, 1, preprocessors, _share(cpus, preprocessors))


def _cpu_pools(config: CaptionConfig, cpus: float) -> Pools:
    replicas = _chosen(config.num_replicas, max(1, int(cpus // _CPUS_PER_CPU_REPLICA)))
    preprocessors = _chosen(config.num_preprocessors, max(1, int(cpus // 4)))
    threads = max(1, int(cpus - preprocessors) // replicas)
    share = _share(cpus, replicas + preprocessors)
    return Pools("cpu", replicas, share, 0, min(threads, _CPUS_PER_CPU_REPLICA), preprocessors, share)


def settled_dtype(config: CaptionConfig, pools: Pools) -> str:
    """What `--dtype auto` comes to on this cluster."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if pools.device == "cuda" else "float32"


def _chosen(option: int | Literal["auto"], auto: int) -> int:
    return auto if option == "auto" else option


def _share(cpus: float, actors: int) -> float:
    """CPUs of each of `actors`: one, or an equal part of what there is, in Ray's steps of 1e-4."""
    return min(1.0, int(cpus / actors * 10_000) / 10_000)


@dataclass(frozen=True)
class Sizes:
    """`rows_per_unit`: what a preprocessor takes at once; `calls_per_replica`: batches that its engine mixes."""

    rows_per_unit: int
    rows_per_batch: int
    calls_per_replica: int


def plan_batches(num_rows: int, pools: Pools, *, most_tile_bytes: int) -> Sizes:
    """Batches of at most BATCH_BYTES, enough of them at once that a replica never runs dry at the end of one.

    Many units, so that every actor has work early and late; larger ones when there would be too many.
    """
    fair_share = num_rows // (16 * pools.num_preprocessors)
    rows_per_unit = max(_power_of_two(min(fair_share, 64)), _power_of_two(num_rows // MAX_BLOCKS), 8)
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
        if address := os.environ.get("RAY_ADDRESS"):
            _check_address(address)
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
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_address(address: str) -> None:
    """Ray itself tries an address that does not answer for minutes. Raises ResourceError."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(
            f"RAY_ADDRESS={address} does not answer ({error}); unset it to run on this machine, or start that cluster"
        ) from error


Cause = TypeVar("Cause", bound=Exception)


def cause_of(error: BaseException | None, kind: type[Cause]) -> Cause | None:
    """The exception of this kind that an actor raised, below the wrappers that Ray puts around it."""
    while error is not None and not isinstance(error, kind):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def last_line(error: Exception) -> str:
    """Of a remote trace: the exception's type and message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Died|Unavailable)\b", line)]
    # Ray's own wrapper comes last and says nothing.
    told = [line for line in named if not re.match(r"ray\.exceptions\.(UserCodeException|RayTaskError)", line)]
    return (told or named or lines)[-1]


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
