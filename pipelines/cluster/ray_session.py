"""Join or start Ray, configure it, and translate its errors to ours."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from pipelines.errors import ResourceError, StageFailed, StoreFault

_LOCAL = {
    "address": "local",
    "num_cpus": max(2, os.cpu_count() or 2),
    "include_dashboard": False,
    "logging_level": logging.CRITICAL,
    "log_to_driver": False,
}


@contextmanager
def open_ray_session() -> Iterator[None]:
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
    with _preserve_sigterm_handler():
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
def _preserve_sigterm_handler() -> Iterator[None]:
    """Restore the handler afterwards: Ray puts its own in place, which prints a stack and exits with code 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_address(address: str) -> None:
    """Raise ResourceError if the address does not answer, which Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(
            f"RAY_ADDRESS={address} does not answer ({error}); unset it to run on this machine, or start that cluster"
        ) from error


@contextmanager
def request_gpus(bundles: Sequence[int]) -> Iterator[None]:
    """Have an autoscaler hold GPUs for these bundles, each of so many on one node, while in the context.

    Ray Data's pools do not make it start any for actors that they could have (ray-project/ray#59144).
    """
    if not bundles:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"GPU": gpus} for gpus in bundles])
    try:
        yield
    finally:
        request_resources(bundles=[])


@contextmanager
def translate_ray_errors() -> Iterator[None]:
    """Raise what an actor raised: StoreFault as such, anything else as StageFailed with its message."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        if fault := find_cause(error, StoreFault):
            raise fault from error
        raise StageFailed(extract_error_line(error)) from error


Cause = TypeVar("Cause", bound=Exception)


def find_cause(error: BaseException | None, kind: type[Cause]) -> Cause | None:
    """Return the exception of this kind that an actor raised, below the wrappers that Ray puts around it."""
    while error is not None and not isinstance(error, kind):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def extract_error_line(error: Exception) -> str:
    """Return the line of a remote trace that holds the exception's type and message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Died|Unavailable)\b", line)]
    # Ray's own wrapper comes last and says nothing.
    told = [line for line in named if not re.match(r"ray\.exceptions\.(UserCodeException|RayTaskError)", line)]
    return (told or named or lines)[-1]


def configure_ray_data(max_block_bytes: int) -> None:
    """Set Ray Data's options for the datasets that this process runs."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows
    context.target_max_block_size = max_block_bytes
    # A pool that may grow does as soon as its actors have work for more than themselves: they always have one call in
    # hand more than they can run.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.01
    # Half an hour without a block fails a run by default: less than a large model may need to load.
    context.execution_no_progress_timeout_s = 4 * 3600
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # What an actor raises is told once, by us, and not with a request to open an issue at Ray's.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.operators.actor_pool_map_operator"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that its bars are off
