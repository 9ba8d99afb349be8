"""FP8: weights with one scale per output and activations with one per token, multiplied in float8_e4m3fn.

Sums are in float32 on every device, so a CPU gives the answers of a GPU but for the order of the sums.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ovis_model.network.kernels import FP8, TORCH, LayerKernels
from ovis_model.sizing import MIN_FP8_CAPABILITY, describe_missing_fp8

_SCALE_NAME = "weight_scale"
_WIDTH_MULTIPLE = 16
"""Torch's product needs rows of whole 16-byte units."""


class Fp8Matrix(NamedTuple):
    """A matrix float8[out, in] and its scales float32[out, 1]; `kernels` quantize what it multiplies."""

    values: Tensor
    scales: Tensor
    kernels: LayerKernels

    def multiply(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply tokens [N, in] -> [N, out] in the dtype of the tokens."""
        values, scales = self.kernels.quantize_rows(tokens)
        # Without fast accumulation: partial sums of 128 products are added in float32.
        product: Tensor = torch._scaled_mm(
            values, self.values.t(), scales, self.scales.t(), bias=bias, out_dtype=tokens.dtype
        )
        return product


class Multiplier(Protocol):
    """A matrix that is not a plain tensor: in FP8, or with a trained addition."""

    def multiply(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply tokens [N, in] -> [N, out]."""
        ...


Matrix = Tensor | Multiplier
"""What a linear layer multiplies with: [in, out] in the model's dtype, or something that multiplies itself."""


def quantize_shapes(linear: nn.Linear) -> None:
    """Give an unloaded layer an FP8 weight and scales. Raise ValueError if its width has no FP8 product."""
    if linear.in_features % _WIDTH_MULTIPLE or linear.out_features % _WIDTH_MULTIPLE:
        raise ValueError(
            f"quantization='fp8' needs widths that are multiples of {_WIDTH_MULTIPLE}, but a layer maps "
            f"{linear.in_features} to {linear.out_features} channels; use fewer ranks or quantization='none'"
        )
    linear.weight = nn.Parameter(linear.weight.to(FP8), requires_grad=False)
    scales = torch.empty(linear.out_features, 1, dtype=torch.float32, device=linear.weight.device)
    linear.register_buffer(_SCALE_NAME, scales, persistent=False)


def get_scales(linear: nn.Module) -> Tensor | None:
    """Return the scales of a quantized layer's weight, float32[out, 1]."""
    return linear._buffers.get(_SCALE_NAME)


def set_scales(linear: nn.Module, scales: Tensor) -> None:
    """Replace the scales of a quantized layer's weight."""
    linear._buffers[_SCALE_NAME] = scales


def make_matrix(weight: Tensor, scales: Tensor | None, kernels: LayerKernels) -> Matrix:
    """Return the matrix of a weight [out, in], quantized if it has scales."""
    return weight.t() if scales is None else Fp8Matrix(weight, scales, kernels)


def check_fp8_device(device: torch.device) -> None:
    """Raise ValueError with the reason if `device` has no FP8 products of rows with scales of their own."""
    if device.type != "cuda":
        _check_fp8_on_cpu()
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_FP8_CAPABILITY:
        raise ValueError(describe_missing_fp8(torch.cuda.get_device_name(device), capability))


def _check_fp8_on_cpu() -> None:
    values, scales = TORCH.quantize_rows(torch.ones(_WIDTH_MULTIPLE, _WIDTH_MULTIPLE))
    try:
        Fp8Matrix(values, scales, TORCH).multiply(torch.ones(2, _WIDTH_MULTIPLE, dtype=torch.bfloat16))
    except RuntimeError as error:  # torch 2.11: only one scale per matrix
        raise ValueError(
            f"quantization='fp8' cannot be simulated on a CPU with torch {torch.__version__}; use torch 2.13 or later, "
            "a GPU, or quantization='none'"
        ) from error
