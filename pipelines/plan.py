"""Plan a run: divide the cluster among the pools of actors, and the rows among their calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.engine.vllm_engine.versions import check_kernels
from pipelines.cluster.resources import (
    Hardware,
    Pools,
    Sizes,
    check_quantization,
    plan_batches,
    plan_pools,
    plan_tensor_parallel,
    prefer_nodes_without,
    resolve_dtype,
)
from pipelines.config import RunConfig
from pipelines.media.frame_encoder import EncoderPool, plan_encoders


@dataclass(frozen=True)
class Plan:
    """The plan of a run. `node_preference`: Ray options that keep preprocessors off the GPU nodes' cores."""

    pools: Pools
    encoders: EncoderPool
    sizes: Sizes
    dtype: Literal["float32", "bfloat16"]
    node_preference: dict[str, Any]

    def __str__(self) -> str:
        """Format the plan as one line for the log."""
        return f"plan: {self.pools}{self.encoders}"


def plan_run(config: RunConfig, num_rows: int) -> Plan:
    """Plan `num_rows` rows on the cluster that this process is connected to. Raise ValueError."""
    model = OvisConfig.from_directory(fetch_checkpoint(config.model, config.revision, weights=False))
    hardware = Hardware.detect()
    check_quantization(config, hardware)
    encoders, pools = share_hardware(config, hardware, model)
    if config.engine == "vllm":
        check_kernels(model.language, pools.device, config.quantization)
    sizes = plan_batches(
        num_rows,
        pools,
        max_tile_bytes=config.max_tiles_per_row * 3 * model.vision.image_size**2,
        tasks_per_row=len(config.questionnaire.tasks),
    )
    return Plan(pools, encoders, sizes, resolve_dtype(config, pools), prefer_nodes_without(hardware.gpu_types))


def share_hardware(config: RunConfig, hardware: Hardware, model: OvisConfig) -> tuple[EncoderPool, Pools]:
    """Plan the pools of encoders, replicas and preprocessors within the resources of the cluster."""
    tensor_parallel = plan_tensor_parallel(config, hardware, model)
    encoders = plan_encoders(config, device=config.device, cpus=hardware.cpus, gpus=sum(hardware.gpus))
    left = hardware.subtract(cpus=encoders.cpus, gpus=encoders.gpus, gpus_per_replica=tensor_parallel)
    min_replicas = 1 if config.num_replicas == "auto" else config.num_replicas
    if encoders.gpus and left.count_replicas(tensor_parallel) < min_replicas:
        encoders = plan_encoders(config, device=config.device, cpus=hardware.cpus, gpus=0)  # replicas come first
        left = hardware.subtract(cpus=encoders.cpus, gpus=0, gpus_per_replica=tensor_parallel)
    return encoders, plan_pools(config, left, tensor_parallel)
