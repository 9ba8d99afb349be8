"""The pieces that the vision tower and the decoder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Bitwise as `RMSNorm`, in two kernels, but always contiguous.

    The tower's features are not, and products with contiguous ones add up in another order than the original's.
    """
    # Without a weight, because torch would multiply by it before it casts back.
    return weight * torch.rms_norm(x, weight.shape, None, eps)


def lay_out(weight: Tensor) -> Tensor:
    """The same matrix [out, in]; on a CPU in float32 stored column by column.

    MKL multiplies the few rows of a decode step by it in as little as half the time, and many rows no slower.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight
