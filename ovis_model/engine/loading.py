"""Options -> an engine core, whole or a rank's part."""

from __future__ import annotations

import torch

from ovis_model.engine.engine_core import EngineCore
from ovis_model.engine.options import Device, Dtype, EngineOptions
from ovis_model.network.tensor_parallel import ALONE, Shard
from ovis_model.network.weights import load_model
from ovis_model.tokenizer import load_tokenizer


def load_core(options: EngineOptions, shard: Shard = ALONE) -> EngineCore:
    """Load the checkpoint; on CUDA also warm up. Raise ConfigError, WeightsError or another ValueError."""
    device = _resolve_device(options.device, shard)
    if options.num_threads or shard.size > 1:
        torch.set_num_threads(max(1, (options.num_threads or torch.get_num_threads()) // shard.size))
    model = load_model(
        options.directory,
        device=device,
        dtype=_resolve_dtype(options.dtype, device),
        post_trunk_norm=options.post_trunk_norm,
        shard=shard,
    )
    core = EngineCore(model, tokenizer=load_tokenizer(options.directory))
    if device.type == "cuda":  # on a CPU there is nothing to capture, and it would take minutes
        core.warm_up()
    return core


def _resolve_device(name: Device, shard: Shard) -> torch.device:
    """Return the device, one of its own for each rank. Raise ValueError if it does not exist."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device; use device='cpu' or check the driver")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if shard.size > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel={shard.size} needs as many CUDA devices; torch sees {torch.cuda.device_count()}"
        )
    if shard.size > 1:
        torch.cuda.set_device(shard.rank)
    return torch.device("cuda")


def _resolve_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """Return the type of the weights; `auto` is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
