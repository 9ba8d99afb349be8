"""What keeps torch from using a GPU is said in a sentence, and float32 stays float32 on a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from ovis_model.network.devices import (
    choose_dtype,
    explain_missing_cuda,
    keep_float32_exact,
    read_driver_version,
    resolve_device,
)
from ovis_model.network.tensor_parallel import ALONE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def install_driver(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Put an nvidia-smi in front of PATH."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


def test_a_driver_older_than_torchs_cuda_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_driver(monkeypatch, tmp_path, "echo 550.54.15; echo 550.54.15")
    assert "built for CUDA 13.0 and needs driver 580 or later, but driver 550.54.15" in explain_missing_cuda("13.0")
    assert "check CUDA_VISIBLE_DEVICES" in explain_missing_cuda("12.6")
    assert "built without CUDA" in explain_missing_cuda(None)


@pytest.mark.parametrize("script", ["exit 9", "echo NVIDIA-SMI has failed", "true"])
def test_a_driver_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    install_driver(monkeypatch, tmp_path, script)
    assert read_driver_version() is None
    assert "nvidia-smi does not run here" in explain_missing_cuda("13.0")


def test_a_missing_device_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="torch sees no CUDA device: nvidia-smi does not run here"):
        resolve_device("cuda", ALONE)
    assert resolve_device("auto", ALONE) == CPU


def test_dtypes_follow_the_device() -> None:
    assert choose_dtype("auto", CPU) == choose_dtype("float32", CUDA) == torch.float32
    assert choose_dtype("auto", CUDA) == torch.bfloat16


def test_float32_on_cuda_convolves_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    keep_float32_exact(CUDA, torch.bfloat16)
    keep_float32_exact(CPU, torch.float32)
    assert torch.backends.cudnn.allow_tf32
    keep_float32_exact(CUDA, torch.float32)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_the_driver_of_this_machine_is_new_enough() -> None:
    assert "check CUDA_VISIBLE_DEVICES" in explain_missing_cuda()
    assert subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0
