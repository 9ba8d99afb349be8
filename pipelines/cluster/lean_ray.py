"""Leave out what a job on one machine does not use of Ray: the processes of its dashboard, autoscaler and log monitor.

Each costs up to a second of start or exit, and Ray has no options against them. So this module replaces functions of
Ray's, each only if this version of Ray has it as expected; otherwise Ray runs in full.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

_LEFT_OUT = {"no_monitor": True, "include_log_monitor": False}


@contextmanager
def start_without_services() -> Iterator[None]:
    """Start Ray, while in the context, without its API server, the monitor of its autoscaler and its log monitor."""
    from ray._private import parameter

    with ExitStack() as replaced:
        if inspect.signature(parameter.RayParams).parameters.keys() >= _LEFT_OUT.keys():
            lean = partial(parameter.RayParams, **_LEFT_OUT)
            replaced.enter_context(_replace("ray._private.parameter", "RayParams", lean))
        no_url, no_process = "", None
        start = "ray._private.services", "start_api_server"
        replaced.enter_context(_replace(*start, lambda *_, **__: (no_url, no_process)))
        yield


@contextmanager
def run_without_scaling() -> Iterator[None]:
    """Run Ray Data, while in the context, without the actors that scale the cluster and count for the dashboard."""
    executor = "ray.data._internal.execution.streaming_executor"
    with (
        _replace(executor, "create_cluster_autoscaler", _make_fixed_cluster),
        _replace("ray.data._internal.stats", "get_or_create_stats_actor", _Deaf),
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
