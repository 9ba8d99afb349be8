"""Count the actors of this run and of other jobs on the cluster, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ovis_model.wording import count_nouns

_STAGES = {"Preprocess": "preprocessors", "Generate": "replicas"}


@dataclass(frozen=True)
class Census:
    """Actors and resources at one moment.

    alive, ended, unready, unplaced: actors of this run by pool. A pool without further work ends its actors. Unready
    ones have not started, unplaced ones have no node yet.
    free, total: amounts by resource.
    others: what each other job holds, by job: "2 CPUs, `python -m jobs.caption` (process 7 on 10.0.0.5)".
    """

    alive: Counter[str]
    ended: Counter[str]
    unready: Counter[str]
    unplaced: Counter[str]
    free: dict[str, float]
    total: dict[str, float]
    others: list[str]


def take_census() -> Census:
    """Ask Ray for the actors of all jobs, and for free and total CPUs and GPUs."""
    import ray

    alive, ended, unready, unplaced = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    held: dict[str, Counter[str]] = {}
    mine = ray.get_runtime_context().get_job_id()
    for job, pool, state, is_placed, resources in _list_actors():
        if job != mine and is_placed and state != "DEAD":
            held.setdefault(job, Counter()).update(resources)
        elif job == mine and pool:
            counts = {"ALIVE": alive, "DEAD": ended}.get(state, unready)
            counts[pool] += 1
            unplaced[pool] += counts is unready and not is_placed
    return Census(
        alive, ended, unready, unplaced, ray.available_resources(), ray.cluster_resources(), _describe_jobs(held)
    )


def has_autoscaler() -> bool | None:
    """Return whether an autoscaler manages the cluster's nodes; None if Ray cannot tell."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # an interface of Ray's developers: whatever it raises, this is only a note in a message
        return None
    # Without an autoscaler, each node counts as a type of its own.
    nodes = [*status.active_nodes, *status.idle_nodes]
    return any(node.ray_node_type_name != f"node_{node.node_id}" for node in nodes)


def _list_actors() -> Iterator[tuple[str, str, str, bool, dict[str, float]]]:
    """Yield job, pool ("" if it is none of ours), state, whether it has a node, and resources of each actor."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    for encoded in state._connect_and_get_accessor().get_actor_table(None, None):
        actor = gcs_pb2.ActorTableData.FromString(encoded)
        name = gcs_pb2.ActorTableData.ActorState.Name(actor.state)
        pool = next((noun for stage, noun in _STAGES.items() if stage in actor.class_name), "")
        yield actor.job_id.hex(), pool, name, bool(actor.pid), dict(actor.required_resources)


def _describe_jobs(held: dict[str, Counter[str]]) -> list[str]:
    from ray._private.state import state

    jobs: dict[str, Any] = {job["JobID"]: job for job in state.job_table()} if held else {}
    ray_uses = ("CPU", "GPU")
    found = []
    for job, resources in held.items():
        amounts = format_amounts({name: resources[name] for name in ray_uses if resources[name]})
        if amounts and job in jobs:
            about = jobs[job]
            found.append(
                f"{amounts}, `{about['Entrypoint']}` (process {about['DriverPid']} on {about['DriverIPAddress']})"
            )
    return found


def format_amounts(amounts: dict[str, float]) -> str:
    """Return for example "2 CPUs and 1 GPU"."""
    return " and ".join(count_nouns(amount, name) for name, amount in amounts.items())
