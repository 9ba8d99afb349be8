"""The hardware of a cluster, and the number of actors of each pool that fit on it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from ovis_model.config import OvisConfig
from ovis_model.sizing import (
    MIN_FP8_CAPABILITY,
    check_tensor_parallel,
    describe_missing_fp8,
    estimate_device_bytes,
    find_min_ranks,
)
from ovis_model.types import MAX_CONCURRENT_SEQUENCES
from ovis_model.wording import count_nouns
from pipelines.cluster.ray_session import extract_error_line
from pipelines.config import ResourceOptions
from pipelines.errors import ResourceError
from pipelines.schema import ROWS_PER_GROUP

BATCH_BYTES = 64 << 20  # maximum bytes of tiles that are passed on at once: a small share of any object store

PREPROCESSORS_PER_GPU = 12  # a core prepares 50 to 90 full-HD JPEGs per second; half are for slow formats and videos
_PREPROCESSORS_PER_CPU = 4  # at most: more than one only helps if they wait for the store
_CPUS_PER_CPU_REPLICA = 8
MAX_BLOCKS = 20_000  # of Ray Data, one or more units each: the driver holds an object per block

GPU_TYPE_LABEL = "ray.io/accelerator-type"  # Ray sets it on nodes with GPUs
_SMALLEST_USUAL_GPU_BYTES = 14 << 30  # 16 GB, minus the share of the driver and other processes
_QUERY_TIMEOUT_S = 60.0  # for the GPU memory of a node


@dataclass(frozen=True)
class Hardware:
    """The hardware of a cluster's nodes.

    cpus: of all nodes together.
    gpus: number of GPUs of each node that has any.
    gpu_types: Ray's names of the GPU models.
    """

    cpus: float
    gpus: tuple[int, ...] = ()
    gpu_types: tuple[str, ...] = ()

    @classmethod
    def detect(cls) -> Hardware:
        """Return the total hardware of all live nodes, whether it is free now or not.

        Ray waits for resources that another job or an earlier pass still holds.
        """
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        with_gpus = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
        return cls(
            sum(node["Resources"].get("CPU", 0) for node in nodes),
            tuple(int(node["Resources"]["GPU"]) for node in with_gpus),
            tuple(sorted({node["Labels"].get(GPU_TYPE_LABEL, "") for node in with_gpus} - {""})),
        )

    def subtract(self, *, cpus: float, gpus: int, gpus_per_replica: int) -> Hardware:
        """Return the hardware that remains after these CPUs and GPUs are taken by other actors.

        Ray decides on which nodes it places them, so the worst placement for the replicas is assumed.
        """
        left = list(self.gpus)
        for _ in range(gpus):
            left[min(range(len(left)), key=lambda node: (left[node] == 0, left[node] % gpus_per_replica))] -= 1
        return replace(self, cpus=self.cpus - cpus, gpus=tuple(filter(None, left)))

    def count_replicas(self, gpus_per_replica: int) -> int:
        """Return the number of replicas that fit. Each needs one node, where its ranks have fast links."""
        return sum(gpus // gpus_per_replica for gpus in self.gpus)


@dataclass(frozen=True)
class Pools:
    """The actors of each pool and the resources that each reserves.

    An actor reserves at most one CPU, so that it fits on any node. All together reserve at most what the cluster has:
    a pool that cannot start waits forever (ray-project/ray#44687).

    may_grow: replicas also start on GPUs that join during the run.
    waits_for_gpus: not all GPUs have joined yet.
    """

    device: Literal["cpu", "cuda"]
    num_replicas: int
    replica_cpus: float
    replica_gpus: int
    threads_per_replica: int
    num_preprocessors: int
    preprocessor_cpus: float
    tensor_parallel: int = 1
    may_grow: bool = False
    waits_for_gpus: bool = False

    def __str__(self) -> str:
        on_cpus = f"{count_nouns(self.threads_per_replica, 'thread')} on CPUs"
        share = count_nouns(self.replica_gpus, "GPU") if self.device == "cuda" else on_cpus
        ranks = f", {self.tensor_parallel} ranks" if self.tensor_parallel > 1 else ""
        more = "; more as GPUs join" * self.may_grow + "; starting as their GPUs join" * self.waits_for_gpus
        replicas = count_nouns(self.num_replicas, "replica")
        return f"{replicas} (each: {share}{ranks}){more}; {count_nouns(self.num_preprocessors, 'preprocessor')}"


def plan_pools(config: ResourceOptions, hardware: Hardware, tensor_parallel: int = 1) -> Pools:
    """Plan the pools for replicas of `tensor_parallel` ranks. Raise ResourceError if the cluster is too small."""
    if hardware.cpus <= 0 and not config.autoscale:
        raise ResourceError("the cluster has no CPUs to decode images with; give Ray at least one")
    if not config.autoscale:
        _check_preprocessors(config.num_preprocessors, hardware.cpus)
    if uses_gpus(config, hardware):
        return _plan_gpu_pools(config, hardware, tensor_parallel)
    return _plan_cpu_pools(config, hardware.cpus, tensor_parallel)


def _check_preprocessors(wanted: int | Literal["auto"], cpus: float) -> None:
    room = max(_PREPROCESSORS_PER_CPU, int(cpus * _PREPROCESSORS_PER_CPU))
    if wanted != "auto" and wanted > room:
        raise ResourceError(
            f"{wanted} preprocessors are too many for the cluster's {count_nouns(cpus, 'CPU')}, which would mostly "
            f"start processes; use --num-preprocessors auto or at most {room}"
        )


def uses_gpus(config: ResourceOptions, hardware: Hardware) -> bool:
    """Return whether the replicas run on GPUs; `--device auto` uses GPUs that exist or can be started."""
    return config.device == "cuda" or (config.device == "auto" and bool(hardware.gpus or config.autoscale))


def _plan_gpu_pools(config: ResourceOptions, hardware: Hardware, tensor_parallel: int) -> Pools:
    room = hardware.count_replicas(tensor_parallel)
    wanted = _resolve_auto(config.num_replicas, room)
    preprocessors = PREPROCESSORS_PER_GPU * wanted * tensor_parallel
    if not config.autoscale:  # the autoscaler also starts cores for the preprocessors
        _check_room(wanted, room, hardware, tensor_parallel)
        # Each rank has a thread that steps the device, which needs a core.
        preprocessors = min(preprocessors, max(1, int(hardware.cpus) - wanted * tensor_parallel))
    preprocessors = _resolve_auto(config.num_preprocessors, preprocessors)
    return Pools(
        device="cuda",
        num_replicas=wanted,
        # A replica reserves no CPU: else preprocessors on all CPUs of its node would keep it from starting.
        replica_cpus=0,
        replica_gpus=tensor_parallel,
        threads_per_replica=1,
        num_preprocessors=preprocessors,
        preprocessor_cpus=1 if config.autoscale else _share(hardware.cpus, preprocessors),
        tensor_parallel=tensor_parallel,
        may_grow=config.num_replicas == "auto",
        waits_for_gpus=wanted > room,
    )


def _check_room(wanted: int, room: int, hardware: Hardware, tensor_parallel: int) -> None:
    if not hardware.gpus:
        raise ResourceError("device=cuda, but the cluster has no GPU; use --device cpu or add a GPU node")
    if not room:
        raise ResourceError(
            f"a replica needs {tensor_parallel} GPUs on one node, but the largest node has {max(hardware.gpus)}; "
            "lower --tensor-parallel or add a larger node"
        )
    if wanted > room:
        each = f" of {tensor_parallel} GPUs on one node" if tensor_parallel > 1 else ""
        raise ResourceError(
            f"{count_nouns(wanted, f'replica{each} needs', f'replicas{each} need')} "
            f"{count_nouns(wanted * tensor_parallel, 'GPU')}; the cluster has {sum(hardware.gpus)}, room "
            f"for {room}. Lower --num-replicas, or add --autoscale if the cluster can start more nodes"
        )


def _plan_cpu_pools(config: ResourceOptions, cpus: float, tensor_parallel: int) -> Pools:
    replicas = _resolve_auto(config.num_replicas, max(1, int(cpus // _CPUS_PER_CPU_REPLICA)))
    preprocessors = _resolve_auto(config.num_preprocessors, max(1, int(cpus // 4)))
    threads = max(1, int(cpus - preprocessors) // replicas)
    share = _share(cpus, replicas + preprocessors)
    threads = min(threads, _CPUS_PER_CPU_REPLICA)
    return Pools("cpu", replicas, share, 0, threads, preprocessors, share, tensor_parallel)


def plan_tensor_parallel(config: ResourceOptions, hardware: Hardware, model: OvisConfig) -> int:
    """Return the number of ranks per replica; for `auto`, the fewest GPUs with memory for a replica and its rows.

    The nodes are asked for their GPU memory only if the model might not fit on the smallest common GPU.
    Raise ValueError.
    """
    if config.tensor_parallel != "auto":
        check_tensor_parallel(model.language, config.tensor_parallel)
        return config.tensor_parallel
    if not uses_gpus(config, hardware):
        return 1
    weights = (4 if config.dtype == "float32" else 2), config.quantization
    if estimate_device_bytes(model, 1, *weights) <= _SMALLEST_USUAL_GPU_BYTES:
        return 1
    if not hardware.gpus:
        raise ResourceError("the cluster has no GPU yet whose memory could be read; set --tensor-parallel N")
    return find_min_ranks(model, query_gpu_memory_bytes(), *weights)


def check_quantization(config: ResourceOptions, hardware: Hardware) -> None:
    """Raise ResourceError if `config` asks for FP8 and a GPU of the cluster has no FP8 products."""
    if config.quantization == "none" or not uses_gpus(config, hardware) or not hardware.gpus:
        return
    for name, capability in query_gpu_capabilities():
        if capability < MIN_FP8_CAPABILITY:
            raise ResourceError(describe_missing_fp8(name, capability))


def query_gpu_memory_bytes() -> int:
    """Return the memory of the cluster's smallest GPU, as reported by each node's driver. Raise ResourceError."""
    remedy = "how much memory the GPUs have", "set --tensor-parallel N"
    return min(int(mib) for (mib,) in _query_gpus("memory.total", *remedy)) << 20


def query_gpu_capabilities() -> list[tuple[str, tuple[int, int]]]:
    """Return the name and the compute capability of each GPU of the cluster. Raise ResourceError."""
    found = _query_gpus("name,compute_cap", "whether the GPUs have FP8", "use --quantization none")
    return [(name, (int(major), int(minor))) for name, (major, minor) in ((n, c.split(".")) for n, c in found)]


def _query_gpus(fields: str, what: str, remedy: str) -> list[list[str]]:
    """Return `fields` of each GPU. Raise ResourceError that says what cannot be read, and the remedy."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    on_nodes = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    query = ray.remote(_query_driver).options(num_cpus=0, max_retries=0)
    try:
        answers = [query.options(scheduling_strategy=on_node).remote(fields) for on_node in on_nodes]
        found: list[list[list[str]]] = ray.get(answers, timeout=_QUERY_TIMEOUT_S)
    except (ray.exceptions.RayError, ValueError) as error:
        raise ResourceError(f"cannot read {what} ({extract_error_line(error)}); {remedy}") from error
    return list(chain.from_iterable(found))


def _query_driver(fields: str) -> list[list[str]]:
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]  # memory in MiB, a line per GPU
    found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_QUERY_TIMEOUT_S)
    return [line.split(", ") for line in found.stdout.splitlines()]


def prefer_nodes_without(gpu_types: tuple[str, ...]) -> dict[str, Any]:
    """Return actor options that prefer nodes without these GPUs, to keep the cores next to GPUs for replicas."""
    if not gpu_types:
        return {}
    others = {GPU_TYPE_LABEL: f"!in({','.join(gpu_types)})"}
    return {"label_selector": others, "fallback_strategy": [{"label_selector": {}}]}


def resolve_dtype(config: ResourceOptions, pools: Pools) -> Literal["float32", "bfloat16"]:
    """Return the dtype that `--dtype auto` resolves to on this cluster."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if pools.device == "cuda" or config.quantization == "fp8" else "float32"


def _resolve_auto(option: int | Literal["auto"], auto: int) -> int:
    return auto if option == "auto" else option


def _share(cpus: float, actors: int) -> float:
    """Return the CPUs that each of `actors` reserves: one, or an equal part of all, in Ray's steps of 1e-4."""
    return min(1.0, int(cpus / actors * 10_000) / 10_000)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the pieces of work.

    rows_per_unit: rows per call of a preprocessor.
    rows_per_batch: rows per call of a replica.
    calls_per_replica: batches that a replica's engine processes at the same time.
    """

    rows_per_unit: int
    rows_per_batch: int
    calls_per_replica: int


def plan_batches(num_rows: int, pools: Pools, *, max_tile_bytes: int, tasks_per_row: int = 1) -> Sizes:
    """Plan batches of at most BATCH_BYTES, and enough concurrent calls to keep a replica busy between batches.

    Units are small, so that every actor has work early and late, but grow with the number of rows to limit the blocks.
    With several replicas, each takes at most half of its share ahead; else the first to start would take all rows.
    """
    fair_share = num_rows // (16 * pools.num_preprocessors)
    rows_per_unit = max(
        _round_down_to_power_of_two(min(fair_share, 64)), _round_down_to_power_of_two(num_rows // MAX_BLOCKS), 8
    )
    rows_per_batch = max(4, min(32, num_rows // (8 * pools.num_replicas), BATCH_BYTES // max_tile_bytes))
    rows_ahead = -(-MAX_CONCURRENT_SEQUENCES // tasks_per_row)
    if pools.num_replicas > 1:
        rows_ahead = min(rows_ahead, max(1, num_rows // (2 * pools.num_replicas)))
    calls = 1 + -(-rows_ahead // rows_per_batch)
    return Sizes(min(rows_per_unit, ROWS_PER_GROUP), rows_per_batch, calls)


def _round_down_to_power_of_two(number: int) -> int:
    """Return the largest power of two up to `number`: units of such sizes fit into the manifest's row groups."""
    return 1 << max(0, number.bit_length() - 1)
