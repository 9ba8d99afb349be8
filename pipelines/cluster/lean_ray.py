"""Leave out what a job on one machine does not use of Ray: its dashboard, autoscaler, log monitor and helper actors.

Each is a process that costs up to a second of start or exit, and Ray has no options against them. So this module
replaces functions of Ray's, each only if this version of Ray has it as expected; otherwise Ray runs in full.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

_COUNT_OF_WORKERS = re.compile(r"^(--(?:num_prestart_python_workers|maximum_startup_concurrency)=)(\d+)$")
_LEFT_OUT = {"no_monitor": True, "include_log_monitor": False}


@contextmanager
def start_without_services() -> Iterator[None]:
    """Start Ray, while in the context, without its API server, the monitor of its autoscaler and its log monitor.

    Processes for the actors start in advance.
    """
    from ray._private import parameter

    with ExitStack() as replaced:
        if inspect.signature(parameter.RayParams).parameters.keys() >= _LEFT_OUT.keys():
            lean = partial(parameter.RayParams, **_LEFT_OUT)
            replaced.enter_context(_replace("ray._private.parameter", "RayParams", lean))
        no_url, no_process = "", None
        start = "ray._private.services", "start_api_server"
        replaced.enter_context(_replace(*start, lambda *_, **__: (no_url, no_process)))
        replaced.enter_context(_wrap("ray._private.services", "start_ray_process", _start_one_more_worker))
        yield


@contextmanager
def run_without_scaling() -> Iterator[None]:
    """Run Ray Data, while in the context, without its actors that scale, count for the dashboard and locate actors."""
    executor = "ray.data._internal.execution.streaming_executor"
    pool = "ray.data._internal.execution.operators.actor_pool_map_operator"
    with (
        _replace(executor, "create_cluster_autoscaler", _make_fixed_cluster),
        _replace("ray.data._internal.stats", "get_or_create_stats_actor", _Deaf),
        _replace(pool, "get_or_create_actor_location_tracker", _Deaf),
        _replace(pool, "get_actor_locations", _locate_actors),
    ):
        yield


@contextmanager
def _replace(module: str, name: str, replacement: object) -> Iterator[None]:
    """Replace a function of a module while in the context, if the module has it."""
    owner = import_module(module)
    if not hasattr(owner, name):
        yield
        return
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _wrap(module: str, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of a module by `wrapper`, which is given the function, while in the context."""
    original = getattr(import_module(module), name, None)
    with _replace(module, name, partial(wrapper, original)):
        yield


def _start_one_more_worker(start: Callable[..., Any], command: Sequence[str], *args: Any, **options: Any) -> Any:
    """Start a process of Ray's; let a raylet start one worker more in advance than this machine has CPUs.

    Preprocessors and replicas take the CPUs, and the actor that counts attempts takes none. Without the additional
    worker a process for the last of them, a replica, would start only when it is asked for.
    """
    return start(
        [_COUNT_OF_WORKERS.sub(lambda found: f"{found[1]}{int(found[2]) + 1}", c) for c in command], *args, **options
    )


def _locate_actors(actors: Iterable[str]) -> dict[str, str]:
    """Return the node of each actor: there is one."""
    import ray

    return dict.fromkeys(actors, ray.get_runtime_context().get_node_id())


def _make_fixed_cluster(*_: Any, **__: Any) -> Any:
    """Return an autoscaler of Ray Data for one machine, which stays as it is."""
    import ray
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution.interfaces import ExecutionResources

    class FixedCluster(ClusterAutoscaler):  # type: ignore[misc]  # a base class without types
        def try_trigger_scaling(self) -> None: ...

        def on_executor_shutdown(self) -> None: ...

        def get_total_resources(self) -> Any:
            return resources

    resources = ExecutionResources.from_resource_dict(ray.cluster_resources())
    return FixedCluster()


class _Deaf:
    """An actor whose methods do nothing."""

    def __getattr__(self, name: str) -> _Deaf:
        return self

    def remote(self, *_: Any, **__: Any) -> None:
        """Do nothing."""
