"""The pieces that the vision tower and the decoder share."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
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


class FusedRMSNorm(RMSNorm):
    """Bitwise the same in fewer kernels, but always contiguous.

    The tower's features are not, and the original's products with them add up in another order than contiguous ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Without a weight, because torch would multiply by it before it casts back.
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


def lay_out(weight: Tensor) -> Tensor:
    """The same matrix [out, in]; on a CPU in float32 stored column by column.

    MKL multiplies the few rows of a decode step by it in as little as half the time, and many rows no slower.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight
