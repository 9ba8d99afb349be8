"""Layers that both the vision tower and the decoder use: norms and linear layers."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ovis_model.network.kernels import TORCH, LayerKernels, add_residual
from ovis_model.network.quantization import Fp8Matrix, Matrix, get_scales

WIDENED_VALUES = 1 << 22
"""Values of a matrix that a product casts to float32 at once: 16 MB, a buffer that malloc keeps for reuse."""


class KernelModule(nn.Module):
    """A module that computes with `kernels`, which `use_kernels` replaces."""

    kernels: LayerKernels = TORCH


def use_kernels(model: nn.Module, kernels: LayerKernels) -> None:
    """Set the kernels of all modules of `model`."""
    for module in model.modules():
        if isinstance(module, KernelModule):
            module.kernels = kernels


class RMSNorm(KernelModule):
    """Root-mean-square norm (arXiv:1910.07467): statistics in float32, cast back before the weight multiplies."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension: contiguous [..., size] -> the same shape."""
        return self.kernels.apply_rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + residual and its norm; without `x`, the residual and its norm.

        Without gradients the sum may overwrite `x`.
        """
        if x is None:
            return residual, self(residual)
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class PatchNorm(RMSNorm):
    """Root-mean-square norm of features [N, P, H], bitwise equal to the original's in float32.

    The original stores features channel by channel, and torch sums in another order along a contiguous dimension. So
    the squares have the original's layout. Only they do, because products of contiguous features are faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension: [N, P, H] -> [N, P, H]."""
        if x.dtype != torch.float32:
            return super().forward(x)
        squares = x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2).copy_(x).square_()
        return self.weight * (x * torch.rsqrt(squares.mean(-1, keepdim=True) + self.eps))

    def add(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm, as `RMSNorm.add` does."""
        if x is None or x.dtype != torch.float32:
            return super().add(x, residual)
        total = add_residual(x, residual)
        return total, self(total)


def lay_out(weight: Tensor) -> Tensor:
    """Return the same matrix [out, in], stored column by column if it is float32 on a CPU.

    MKL then multiplies the few tokens of a decode step in as little as half the time, and many tokens no slower.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply `x` [..., in] by `weight` [out, in], in the dtype of `x` whatever the dtype of the weight.

    Under autocast, as in training, that decides the dtype.
    """
    if x.dtype == weight.dtype or _is_under_autocast(x):
        return F.linear(x, weight, bias)
    return _multiply_widened(x.flatten(0, -2), weight.t(), bias).view(*x.shape[:-1], -1)


def project(tokens: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """Multiply tokens [N, in] by a matrix [in, out] like `apply_linear`, without the overhead of `F.linear`."""
    if not isinstance(matrix, Tensor):
        return matrix.multiply(tokens, bias)
    if tokens.dtype != matrix.dtype and not _is_under_autocast(tokens):
        return _multiply_widened(tokens, matrix, bias)
    return torch.mm(tokens, matrix) if bias is None else torch.addmm(bias, tokens, matrix)


def _is_under_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # the meta device has no autocast


def _multiply_widened(tokens: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in the dtype of the tokens; the matrix is cast some columns at a time."""
    size, width = matrix.shape
    out, step = tokens.new_empty(len(tokens), width), max(1, WIDENED_VALUES // size)
    for columns in (slice(start, start + step) for start in range(0, width, step)):
        torch.mm(tokens, matrix[:, columns].to(tokens.dtype), out=out[:, columns])
    return out if bias is None else out.add_(bias)


class Linear(KernelModule, nn.Linear):
    """A linear layer for inputs in any dtype, see `apply_linear`; it may be quantized."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] -> [..., out] in the dtype of `x`."""
        scales = get_scales(self)
        if scales is None:
            return apply_linear(x, self.weight, self.bias)
        product = Fp8Matrix(self.weight, scales, self.kernels).multiply(x.flatten(0, -2), self.bias)
        return product.view(*x.shape[:-1], -1)


def choose_pass_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of activations in passes over many tokens (vision, prefill), for weights of `dtype`.

    It is float32 for bfloat16 weights on a CPU that multiplies bfloat16 more slowly. Such a pass uses each weight for
    many tokens, so the cost of casting it is negligible. Decode steps stay in `dtype`, because they are bound by the
    time to read the weights.
    """
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" and _is_slow_in_bfloat16() else dtype


@cache
def _is_slow_in_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 more slowly than float32.

    The CPU's features decide, not a measurement, so that a machine always gives the same results. On x86, AMX and AMD's
    AVX512-BF16 have at least twice the rate of float32. Intel's AVX512-BF16 has half the rate, and without either,
    bfloat16 is emulated. Other architectures are assumed to be fast.
    """
    cpu = torch.cpu.get_capabilities()
    is_amd = cpu.get("sse4a", False)  # no other maker has it
    is_fast = cpu.get("amx_bf16", False) or (is_amd and cpu.get("avx512_bf16", False))
    return cpu["architecture"] == "x86_64" and not is_fast
