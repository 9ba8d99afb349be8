"""Layers that the vision tower and the decoder share: norms, linear layers, gating."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

WIDENED_VALUES = 1 << 22
"""Of a matrix that products have in a wider type at once: 16 MB, which malloc keeps and does not give back."""


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467): statistics in float32, cast back before the weight multiplies."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class PatchNorm(RMSNorm):
    """Of features [N, P, H], in float32 bitwise as `RMSNorm` on features that lie channel by channel.

    The original's lie so, and torch adds up in another order along a dimension that is contiguous: so the squares are
    laid out like the original's, and nothing else, because products of contiguous features are faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return super().forward(x)
        squares = x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2).copy_(x).square_()
        return self.weight * (x * torch.rsqrt(squares.mean(-1, keepdim=True) + self.eps))


def apply_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Bitwise as `RMSNorm` of a contiguous x, in one kernel or two."""
    if x.dtype == weight.dtype == torch.float32:
        return torch.rms_norm(x, weight.shape, weight, eps)
    # Without a weight, because torch would multiply by it before it casts back.
    return weight * torch.rms_norm(x, weight.shape, None, eps)


def lay_out(weight: Tensor) -> Tensor:
    """The same matrix [out, in]; on a CPU in float32 stored column by column.

    MKL multiplies the few rows of a decode step by it in as little as half the time, and many rows no slower.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] in the type of x, whatever that of the weights."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return _multiply_widened(x.flatten(0, -2), weight.t(), bias).view(*x.shape[:-1], -1)


def project(tokens: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of tokens [N, in] and a matrix [in, out], past what `F.linear` does to get there."""
    if tokens.dtype != matrix.dtype:
        return _multiply_widened(tokens, matrix, bias)
    return torch.mm(tokens, matrix) if bias is None else torch.addmm(bias, tokens, matrix)


def _multiply_widened(tokens: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """The matrix is cast to the type of the tokens some columns at a time."""
    size, width = matrix.shape
    out, step = tokens.new_empty(len(tokens), width), max(1, WIDENED_VALUES // size)
    for columns in (slice(start, start + step) for start in range(0, width, step)):
        torch.mm(tokens, matrix[:, columns].to(tokens.dtype), out=out[:, columns])
    return out if bias is None else out.add_(bias)


class Linear(nn.Linear):
    """Of inputs in the type of the weights or another: see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Of inputs in the type of the weights or another."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def apply_gate(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of `gate` times `up`, for SwiGLU (arXiv:2002.05202); without gradients in the memory of `gate`."""
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


def choose_pass_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of activations in passes over many tokens (vision, prefill), for weights of `dtype`.

    float32 for bfloat16 on a CPU whose products in bfloat16 are slower: the weights are read once for many tokens, so
    casting them is nothing beside that. Decode steps, which wait for the weights' bytes, stay in `dtype`.
    """
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" and _is_slow_in_bfloat16() else dtype


@cache
def _is_slow_in_bfloat16() -> bool:
    """By what the CPU is, not by a measurement, so that a machine always gives the same results.

    Fast on x86 are AMX and AMD's AVX512-BF16, at least twice the rate of float32; Intel's AVX512-BF16 has half of it,
    and without either bfloat16 is emulated. Other architectures are taken to be fast.
    """
    cpu = torch.cpu.get_capabilities()
    is_amd = cpu.get("sse4a", False)  # no other maker has it
    is_fast = cpu.get("amx_bf16", False) or (is_amd and cpu.get("avx512_bf16", False))
    return cpu["architecture"] == "x86_64" and not is_fast
