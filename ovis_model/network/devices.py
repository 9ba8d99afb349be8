"""Choose the device and the dtype of a model, and say what keeps torch from using a GPU."""

from __future__ import annotations

import subprocess
from typing import Literal

import torch

from ovis_model.config import Quantization
from ovis_model.network.quantization import check_fp8_device
from ovis_model.network.tensor_parallel import Shard

_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The least NVIDIA driver for each major version of CUDA, by the compatibility table of its release notes."""


def resolve_device(name: Literal["auto", "cpu", "cuda"], shard: Shard) -> torch.device:
    """Return the device of this rank; on CUDA each rank has a separate one. Raise ValueError if it does not exist."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device='cuda', but torch sees no CUDA device: {explain_missing_cuda()}; or use device='cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if shard.size > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel={shard.size} needs as many CUDA devices; torch sees {torch.cuda.device_count()}"
        )
    if shard.size > 1:
        torch.cuda.set_device(shard.rank)
    return torch.device("cuda")


def choose_dtype(
    name: Literal["auto", "float32", "bfloat16"], device: torch.device, quantization: Quantization = "none"
) -> torch.dtype:
    """Return the dtype of what is not quantized; `auto` is float32 on a CPU, else and with FP8 bfloat16.

    Raise ValueError if FP8 is asked for with float32, or on a GPU without it.
    """
    if quantization == "fp8":
        if name == "float32":
            raise ValueError("quantization='fp8' needs dtype='bfloat16', but dtype='float32' was given")
        check_fp8_device(device)
    elif name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def keep_float32_exact(device: torch.device, dtype: torch.dtype) -> None:
    """Switch TF32 off for convolutions of this process if a float32 model runs on CUDA; torch's default is on.

    With it, the patch embeddings would have 10 bits of mantissa, and an answer could differ from the request alone.
    """
    if device.type == "cuda" and dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def explain_missing_cuda(cuda_version: str | None = torch.version.cuda) -> str:
    """Return what to do so that torch, built for `cuda_version`, sees a GPU."""
    driver = read_driver_version()
    if driver is None:
        return "nvidia-smi does not run here; install NVIDIA's driver, or start the container with GPUs"
    if cuda_version is None:
        return (
            f"driver {driver} is installed, but torch {torch.__version__} is built without CUDA; install it from PyPI"
        )
    least = _LEAST_DRIVER.get(int(cuda_version.split(".")[0]), 0)
    if int(driver.split(".")[0]) < least:
        return (
            f"torch {torch.__version__} is built for CUDA {cuda_version} and needs driver {least} or later, but driver "
            f"{driver} is installed; update the driver, or install torch for an older CUDA"
        )
    return f"driver {driver} is installed; check CUDA_VISIBLE_DEVICES and that /dev/nvidia* can be opened"


def read_driver_version() -> str | None:
    """Return the version of NVIDIA's driver by nvidia-smi, e.g. "580.95.05", or None without a working one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first, *_ = run.stdout.split() or [""]
    return first if first[:1].isdigit() else None
