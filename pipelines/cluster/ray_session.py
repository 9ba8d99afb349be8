"""Join or start Ray, configure it, and translate its errors to those of the pipelines."""

from __future__ import annotations

import logging
import os
import re
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.cluster.address import check_address
from pipelines.cluster.lean_ray import run_without_scaling
from pipelines.cluster.local_ray import start_local_ray
from pipelines.errors import EngineNotStarted, NodeIncomplete, ProcessesDie, StageFailed, StoreFault

_EXECUTOR_END_S = 10.0

logger = logging.getLogger(__name__)


@contextmanager
def open_ray_session() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of a submitted job, else run a local one while in the context."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Inherited by the local cluster's processes: see generate.load_engine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Else each pool logs an error at its start, about arguments that are far too small to be evicted (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():  # by the calling program, which also ends it
        yield
        return
    _use_root_handlers("ray")
    with _preserve_sigterm_handler(), _drop_level_line():
        if address := os.environ.get("RAY_ADDRESS"):
            check_address(address)
            context = ray.init(address="auto", logging_level=logging.WARNING, log_to_driver=False)
        else:
            context = start_local_ray()
    try:
        with nullcontext() if address else run_without_scaling(), _shorten_raylet_messages():
            yield
    except (ProcessesDie, StageFailed):
        logger.warning(
            "Ray's logs are in %s/logs%s", context.address_info["session_dir"], " of each node" * bool(address)
        )
        raise
    finally:
        ray.shutdown()


@contextmanager
def _drop_level_line() -> Iterator[None]:
    """Drop from descriptor 2 the line with which Ray's C++ reports RAY_BACKEND_LOG_LEVEL; pass on others at the end."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
    except OSError:  # no temporary directory: start_local_ray says so
        yield
        return
    with file:
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            file.seek(0)
            os.write(2, b"".join(line for line in file if b"RAY_BACKEND_LOG_LEVEL" not in line))


def _use_root_handlers(name: str) -> None:
    """Let the root logger's handlers decide where a library's records go, instead of a handler that prints them."""
    library = logging.getLogger(name)
    library.handlers = [handler for handler in library.handlers if not isinstance(handler, logging.StreamHandler)]
    library.propagate = True


@contextmanager
def _shorten_raylet_messages() -> Iterator[None]:
    """Print only the first sentence of what Ray itself reports, not the traces of actors: their errors are raised.

    Ray has no setting for it: `log_to_driver` is about what actors print.
    """
    from ray._private import worker

    print_message = worker.print_to_stdstream
    worker.print_to_stdstream = lambda data, **options: print_message(_shorten_message(data), **options)
    try:
        yield
    finally:
        worker.print_to_stdstream = print_message


def _shorten_message(data: dict[str, Any]) -> dict[str, Any]:
    if data.get("pid") != "raylet":
        return data
    return {**data, "lines": [re.split(r"\s*(?:Error: Traceback|\n)", line)[0] for line in data["lines"]]}


@contextmanager
def _preserve_sigterm_handler() -> Iterator[None]:
    """Restore the SIGTERM handler afterwards: Ray installs one that exits. Here, it stops the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # of Ray's handler
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def request_gpus(bundles: Sequence[int]) -> Iterator[None]:
    """Request from the autoscaler, while in the context, that many GPUs on one node for each bundle.

    Ray Data's pools do not request nodes for actors beyond the cluster's size (ray-project/ray#59144).
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
    """Raise an actor's StoreFault or ProcessesDie unchanged, its other errors as StageFailed with their message.

    A package that an actor cannot import is NodeIncomplete. An engine that does not start is EngineNotStarted.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        if fault := find_cause(error, StoreFault) or find_cause(error, ProcessesDie):
            raise fault from error
        if found := re.search(rf"^[\w.]*\b{EngineNotStarted.__name__}: (.+)$", str(error), re.MULTILINE):
            raise EngineNotStarted(found[1]) from None
        if missing := describe_missing_package(str(error)):
            raise NodeIncomplete(missing) from None
        raise StageFailed(extract_error_line(error)) from error


Cause = TypeVar("Cause", bound=Exception)


def find_cause(error: BaseException | None, kind: type[Cause]) -> Cause | None:
    """Return the exception of this kind that an actor raised, inside Ray's wrappers; None if there is none.

    A wrapper may be of this kind too, but its text is a remote trace.
    """
    while error is not None and (not isinstance(error, kind) or isinstance(getattr(error, "cause", None), kind)):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def describe_missing_package(text: str) -> str:
    """Return which node of a remote trace cannot import what; "" if the trace is about something else."""
    found = re.search(r"^(?:ModuleNotFoundError|ImportError): (.+)$", text, re.MULTILINE)
    if found is None:
        return ""
    place = re.search(r"\bip=([^\s,)]+)", text)
    node = f"node {place[1]}" if place else "a node"
    return (
        f"{node} cannot import a package that the run needs ({found[1]}); install this project and all its packages "
        "on every node, as docs/cluster.md says"
    )


def extract_error_line(error: Exception) -> str:
    """Return the line of a remote trace that has the exception's type and message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Died|Unavailable)\b", line)]
    # Ray's wrapper comes last, without any information.
    informative = [line for line in named if not re.match(r"ray\.exceptions\.(UserCodeException|RayTaskError)", line)]
    return (informative or named or lines)[-1]


def stream_tables(dataset: Any) -> Generator[pa.Table, None, None]:
    """Yield the blocks of a Ray dataset of Arrow tables as they are finished; its stages end when this is closed.

    Close it if an exception ends its use: a thread that calls Ray after `ray.shutdown` ends the process at once, with
    exit code 1 and no word. Dataset.iter_batches would leave such threads behind for a moment.
    """
    import ray

    try:
        for bundle in dataset.iter_internal_ref_bundles():
            for block in bundle.block_refs:
                yield ray.get(block)
    finally:
        _wait_for_executors()


def _wait_for_executors() -> None:
    """Wait until no thread runs stages. Ray Data waits for 2 s itself, which a busy machine may exceed."""
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(_EXECUTOR_END_S)


def configure_ray_data(max_block_bytes: int) -> None:
    """Set Ray Data's options for all datasets of this process."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # monitoring.progress counts rows instead
    context.target_max_block_size = max_block_bytes
    # A pool that may grow does so as soon as its actors have more calls than they can run: each always has one extra.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.01
    # Ray's default fails a run after half an hour without a block; loading a large model can take longer.
    context.execution_no_progress_timeout_s = 4 * 3600
    _use_root_handlers("ray.data")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # The driver reports an actor's error once; Ray would repeat it and ask the user to open an issue at its project.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.operators.actor_pool_map_operator"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that its bars are off
