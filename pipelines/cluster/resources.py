"""The hardware of a cluster, and how many actors of each pool fit on it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from typing import Any, Literal

from ovis_model.config import OvisConfig
from ovis_model.sizing import check_tensor_parallel, estimate_device_bytes, find_min_ranks
from ovis_model.types import MAX_CONCURRENT_SEQUENCES
from pipelines.cluster.ray_session import extract_error_line
from pipelines.config import ResourceOptions
from pipelines.errors import ResourceError
from pipelines.schema import ROWS_PER_GROUP

BATCH_BYTES = 64 << 20  # of tiles that are handed on at once: a small share of any object store

PREPROCESSORS_PER_GPU = 12  # one core prepares about 12 full-HD images a second, a GPU takes many more
_CPUS_PER_CPU_REPLICA = 8
MAX_BLOCKS = 20_000  # of units: the driver holds an object for each

GPU_TYPE_LABEL = "ray.io/accelerator-type"  # Ray's own, on nodes with GPUs
_SMALLEST_USUAL_GPU_BYTES = 14 << 30  # 16 GB, less what a driver and other processes take
_ASK_S = 60.0  # for the memory of a node's GPUs


@dataclass(frozen=True)
class Hardware:
    """What the nodes of a cluster have. `gpus`: of each node that has some; `gpu_types`: Ray's names of them."""

    cpus: float
    gpus: tuple[int, ...] = ()
    gpu_types: tuple[str, ...] = ()

    @classmethod
    def detect(cls) -> Hardware:
        """Return what all nodes that are alive have, not what is free now.

        Ray waits for what another job or an earlier pass still holds.
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
        """Return what other actors leave. Ray decides on which nodes their GPUs are: the worst is assumed."""
        left = list(self.gpus)
        for _ in range(gpus):
            left[min(range(len(left)), key=lambda node: (left[node] == 0, left[node] % gpus_per_replica))] -= 1
        return replace(self, cpus=self.cpus - cpus, gpus=tuple(filter(None, left)))

    def count_replicas(self, gpus_per_replica: int) -> int:
        """Return the number of replicas that fit, each on one node, where its ranks have fast links."""
        return sum(gpus // gpus_per_replica for gpus in self.gpus)


@dataclass(frozen=True)
class Pools:
    """Actors and what each reserves: never more than one CPU, so that any node can hold any of them, and together
    never more than there is. A pool that cannot start waits for ever (ray-project/ray#44687).

    `may_grow`: replicas start on GPUs that join while the run is on; `waits_for_gpus`: not all GPUs are there yet.
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
        each = "1 GPU" if self.replica_gpus == 1 else f"{self.replica_gpus} GPUs"
        ranks = f" in {self.tensor_parallel} ranks" if self.tensor_parallel > 1 else ""
        share = f"on {each}" if self.device == "cuda" else f"with {self.threads_per_replica} threads on CPUs"
        more = ", more as GPUs join" * self.may_grow + ", as soon as their GPUs are there" * self.waits_for_gpus
        return f"{self.num_replicas} x the model {share}{ranks}{more}; {self.num_preprocessors} to prepare images"


def plan_pools(config: ResourceOptions, hardware: Hardware, tensor_parallel: int = 1) -> Pools:
    """Plan the pools for replicas of `tensor_parallel` ranks. Raises ResourceError if the cluster has too little."""
    if hardware.cpus <= 0 and not config.autoscale:
        raise ResourceError("the cluster has no CPUs to decode images with; give Ray at least one")
    if uses_gpus(config, hardware):
        return _plan_gpu_pools(config, hardware, tensor_parallel)
    return _plan_cpu_pools(config, hardware.cpus, tensor_parallel)


def uses_gpus(config: ResourceOptions, hardware: Hardware) -> bool:
    return config.device == "cuda" or (config.device == "auto" and bool(hardware.gpus or config.autoscale))


def _plan_gpu_pools(config: ResourceOptions, hardware: Hardware, tensor_parallel: int) -> Pools:
    room = hardware.count_replicas(tensor_parallel)
    wanted = _resolve_auto(config.num_replicas, room)
    preprocessors = PREPROCESSORS_PER_GPU * wanted * tensor_parallel
    if not config.autoscale:  # which has cores started for them too
        _check_room(wanted, room, hardware, tensor_parallel)
        preprocessors = min(preprocessors, max(1, int(hardware.cpus) - wanted))  # a replica's thread keeps a core busy
    preprocessors = _resolve_auto(config.num_preprocessors, preprocessors)
    return Pools(
        device="cuda",
        num_replicas=wanted,
        # A replica reserves no CPU: preprocessors that took all those of a GPU's node would keep it from starting.
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
            f"a replica needs {tensor_parallel} GPUs of one node, and the largest node has {max(hardware.gpus)}; "
            "lower --tensor-parallel or add a larger node"
        )
    if wanted > room:
        each = f" of {tensor_parallel} GPUs on one node" if tensor_parallel > 1 else ""
        raise ResourceError(
            f"{wanted} replicas{each} need {wanted * tensor_parallel} GPUs; the cluster has {sum(hardware.gpus)}, room "
            f"for {room}. Lower --num-replicas, or give --autoscale if the cluster can start more nodes"
        )


def _plan_cpu_pools(config: ResourceOptions, cpus: float, tensor_parallel: int) -> Pools:
    replicas = _resolve_auto(config.num_replicas, max(1, int(cpus // _CPUS_PER_CPU_REPLICA)))
    preprocessors = _resolve_auto(config.num_preprocessors, max(1, int(cpus // 4)))
    threads = max(1, int(cpus - preprocessors) // replicas)
    share = _share(cpus, replicas + preprocessors)
    threads = min(threads, _CPUS_PER_CPU_REPLICA)
    return Pools("cpu", replicas, share, 0, threads, preprocessors, share, tensor_parallel)


def plan_tensor_parallel(config: ResourceOptions, hardware: Hardware, model: OvisConfig) -> int:
    """Return the ranks of a replica: for `auto`, the fewest GPUs that hold a replica and room for its rows.

    The GPUs' memory is asked for only if the model might not fit into the smallest that are usual. Raises ValueError.
    """
    if config.tensor_parallel != "auto":
        check_tensor_parallel(model.language, config.tensor_parallel)
        return config.tensor_parallel
    if not uses_gpus(config, hardware):
        return 1
    value_bytes = 4 if config.dtype == "float32" else 2
    if estimate_device_bytes(model, 1, value_bytes) <= _SMALLEST_USUAL_GPU_BYTES:
        return 1
    if not hardware.gpus:
        raise ResourceError("no GPU is there yet to tell how much memory it has; give --tensor-parallel N")
    return find_min_ranks(model, query_gpu_memory_bytes(), value_bytes)


def query_gpu_memory_bytes() -> int:
    """Return the memory of the cluster's smallest GPU, as reported by each node's driver. Raises ResourceError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    here = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    ask = ray.remote(_ask_driver).options(num_cpus=0, max_retries=0)
    try:
        told: list[int] = ray.get([ask.options(scheduling_strategy=node).remote() for node in here], timeout=_ASK_S)
        return min(told)
    except (ray.exceptions.RayError, ValueError) as error:
        raise ResourceError(
            f"cannot tell how much memory the GPUs have ({extract_error_line(error)}); give --tensor-parallel N"
        ) from error


def _ask_driver() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # MiB, a line for each
    told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_ASK_S)
    return min(map(int, told.stdout.split())) << 20


def prefer_nodes_without(gpu_types: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of an actor that leaves the cores next to GPUs to the replicas, if there are other cores."""
    if not gpu_types:
        return {}
    others = {GPU_TYPE_LABEL: f"!in({','.join(gpu_types)})"}
    return {"label_selector": others, "fallback_strategy": [{"label_selector": {}}]}


def resolve_dtype(config: ResourceOptions, pools: Pools) -> Literal["float32", "bfloat16"]:
    """Return the dtype that `--dtype auto` resolves to on this cluster."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if pools.device == "cuda" else "float32"


def _resolve_auto(option: int | Literal["auto"], auto: int) -> int:
    return auto if option == "auto" else option


def _share(cpus: float, actors: int) -> float:
    """Return the CPUs of each of `actors`: one, or an equal part of all CPUs, in Ray's steps of 1e-4."""
    return min(1.0, int(cpus / actors * 10_000) / 10_000)


@dataclass(frozen=True)
class Sizes:
    """`rows_per_unit`: what a preprocessor takes at once; `calls_per_replica`: batches that its engine mixes."""

    rows_per_unit: int
    rows_per_batch: int
    calls_per_replica: int


def plan_batches(num_rows: int, pools: Pools, *, max_tile_bytes: int, tasks_per_row: int = 1) -> Sizes:
    """Plan batches of at most BATCH_BYTES, enough at once that a replica never runs dry at the end of one.

    Many units, so that every actor has work early and late; larger ones when there would be too many. Of several
    replicas none takes more than half of its share ahead: the first to be ready would leave the others nothing.
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
    """Return the largest one up to `number`, so that units fit into the row groups of the manifest."""
    return 1 << max(0, number.bit_length() - 1)
