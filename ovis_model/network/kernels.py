"""The small operations between matrix products: norms, gates, rotations and the visual head's probabilities.

`TorchKernels` is the reference, in plain torch, for every device and dtype. In half precision on CUDA the kernels of
`kernels_triton` do the same in one launch each, with the same roundings. OVIS_KERNELS=triton or torch overrides the
choice there.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0
MIN_MAGNITUDE = 1e-12
"""Magnitude from which rows are scaled, so that a row of zeros has a scale."""
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [B, T, 1, head_dim] of RoPE; the first half of the sines is negated."""


class LayerKernels(Protocol):
    """One implementation. Inputs are contiguous in their last dimension; results have the dtype of the inputs."""

    pads_columns: bool  # the visual head and the table are computed on buffers of a whole number of cache lines

    def apply_rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize the last dimension of a contiguous [..., size]; the weight multiplies after the rounding."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + residual and its norm; all are contiguous [..., size].

        Without gradients the sum may overwrite `x`.
        """
        ...

    def apply_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return SiLU(gate) * up, for SwiGLU (arXiv:2002.05202). Without gradients the result overwrites `gate`."""
        ...

    def rotate(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Apply RoPE to [B, T, heads, head_dim]; a pair has one channel in each half of a head."""
        ...

    def compute_word_probabilities(self, words: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Apply the layer norm and a softmax to [n, width]; without gradients the result may overwrite `words`.

        The norm has at most `width` channels. Columns beyond them are padding and become 0.
        """
        ...

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round each row of [N, size] to float8_e4m3fn [N, size] times a scale float32[N, 1].

        The row's largest magnitude becomes the largest float8 number.
        """
        ...


class TorchKernels:
    """The reference: several launches per operation."""

    pads_columns = False

    def apply_rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Run torch's kernel: statistics in float32, cast back before the weight multiplies."""
        if x.dtype == weight.dtype == torch.float32:
            return torch.rms_norm(x, weight.shape, weight, eps)
        # The weight multiplies afterwards, because torch would apply it before casting back.
        return weight * torch.rms_norm(x, weight.shape, None, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Overwrite `x` with the sum, except while gradients are recorded, then normalize it."""
        total = add_residual(x, residual)
        return total, self.apply_rms_norm(total, weight, eps)

    def apply_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Overwrite `gate`, except while gradients are recorded."""
        if torch.is_grad_enabled():
            return F.silu(gate) * up
        return F.silu(gate, inplace=True).mul_(up)

    def rotate(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Add the rotated halves, times the sines, to the input, times the cosines."""
        cos, sin = rotary
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    def compute_word_probabilities(self, words: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Normalize the channels of `norm`, in the dtype of `words`; pad the probabilities with zeros."""
        width = norm.weight.shape[0]
        weight, bias = norm.weight.to(words.dtype), norm.bias.to(words.dtype)
        probabilities = F.layer_norm(words[..., :width], (width,), weight, bias, norm.eps).softmax(-1)
        return F.pad(probabilities, (0, words.shape[-1] - width)) if words.shape[-1] > width else probabilities

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round to the nearest float8 number, some rows at a time."""
        largest = torch.linalg.vector_norm(x, math.inf, -1, keepdim=True)  # without a copy of magnitudes
        scales = largest.float().clamp(min=MIN_MAGNITUDE) / MAX_FP8
        values = torch.empty(x.shape, dtype=FP8, device=x.device)
        step = max(1, _WIDE_VALUES // x.shape[-1])
        for out, part, scale in zip(*(torch.split(each, step) for each in (values, x, scales)), strict=True):
            out.copy_(part / scale)
        return values, scales


def add_residual(x: Tensor, residual: Tensor) -> Tensor:
    """Return x + residual. The sum overwrites `x`, except while gradients are recorded.

    Recomputing a layer in the backward pass needs its inputs as they were.
    """
    return x + residual if torch.is_grad_enabled() else x.add_(residual)


TORCH = TorchKernels()
_WIDE_VALUES = 1 << 22  # that the reference has in float32 while it quantizes, 16 MB


def choose_layer_kernels(dtype: torch.dtype, device: torch.device) -> LayerKernels:
    """Return the fastest kernels for a model of `dtype` on `device`; on CUDA, OVIS_KERNELS overrides them.

    Raise ValueError if the kernels that OVIS_KERNELS names cannot run here.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return TORCH
    found, name = list_layer_kernels(), os.environ.get("OVIS_KERNELS")
    if name is not None and name not in found:
        raise ValueError(
            f"OVIS_KERNELS={name} is not available here; use one of {', '.join(found)} or unset it. "
            "triton needs the package of that name and a C compiler"
        )
    return found[name]() if name is not None else next(iter(found.values()))()


def list_layer_kernels() -> dict[str, Callable[[], LayerKernels]]:
    """Return makers of the kernels that can run on CUDA here, by name, the fastest first."""
    found: dict[str, Callable[[], LayerKernels]] = {"torch": TorchKernels}
    return {"triton": _make_triton_kernels, **found} if _can_compile() else found


def _can_compile() -> bool:
    """Return whether Triton is installed with the C compiler that it builds its launcher with."""
    return bool(importlib.util.find_spec("triton")) and any(
        map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))
    )


def _make_triton_kernels() -> LayerKernels:
    from ovis_model.network.kernels_triton import TritonKernels

    return TritonKernels()
