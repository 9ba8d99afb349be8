"""Find out why the process of an actor ended, and whether the cause is known to lie outside of its work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Process:
    """A process of an actor, by Ray's ids in hex; `actor` stays the same when Ray replaces the process."""

    actor: str
    worker: str
    node: str
    address: str


@dataclass(frozen=True)
class Exit:
    """Why a process ended.

    kind: `memory` if Ray's memory monitor killed it, `node` if its node was lost or drained, else `unknown`.
    reason: one sentence.
    """

    kind: Literal["memory", "node", "unknown"]
    address: str
    reason: str

    @property
    def is_outside(self) -> bool:
        """Whether no work of the process can be the cause."""
        return self.kind != "unknown"


def identify_process() -> Process:
    """Identify this process, which must be an actor's."""
    import ray

    context = ray.get_runtime_context()
    address = ray.util.get_node_ip_address()
    return Process(context.get_actor_id() or "", context.get_worker_id(), context.get_node_id(), address)


def find_exit(process: Process) -> Exit:
    """Ask Ray why a process ended that has been replaced."""
    import ray

    nodes = {node["NodeID"]: node for node in ray.nodes()}
    if not (node := nodes.get(process.node)) or not node["Alive"]:
        why = (node or {}).get("DeathReasonMessage") or "no reason given"
        return Exit("node", process.address, f"node {process.address} was lost ({_cut_sentence(why)})")
    kind, detail = _read_exit(process.worker)
    if kind == "NODE_OUT_OF_MEMORY":
        used = re.search(r"was ([\d.]+ ?GB) used / ([\d.]+ ?GB) limit", detail)
        amount = f" ({used[1]} of {used[2]})" if used else ""
        return Exit("memory", process.address, f"node {process.address} is low on memory{amount}")
    if "drain" in detail.lower() or "preempt" in detail.lower():
        return Exit("node", process.address, f"node {process.address} is drained ({_cut_sentence(detail)})")
    return Exit("unknown", process.address, f"{_cut_sentence(detail)}, on node {process.address}")


def _read_exit(worker: str) -> tuple[str, str]:
    """Return the type of a worker's exit and its detail, as in the output of `ray list workers --detail`.

    Ray's public way to these two fields needs the dashboard, which a local cluster does not have.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated import common_pb2, gcs_pb2

    encoded = state._connect_and_get_accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker)))
    if encoded is None:
        return "", "Ray does not know why"
    found = gcs_pb2.WorkerTableData.FromString(encoded)
    return common_pb2.WorkerExitType.Name(found.exit_type), found.exit_detail


def _cut_sentence(text: str) -> str:
    """Return the first sentence, or two if the first has no information."""
    sentences = re.split(r"\.\s+", text.strip().splitlines()[0] if text.strip() else "no reason given")
    return sentences[0].rstrip(".")
