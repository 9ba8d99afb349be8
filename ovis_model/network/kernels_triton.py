"""The operations of `kernels.LayerKernels` in half precision on CUDA, one launch each.

Each kernel computes in float32 and rounds where the reference rounds, so only the order of sums differs. A program
computes one row. Values are cast to float32 as soon as they are loaded: Triton's interpreter, in which the tests run
the kernels on a CPU, stores bfloat16 as integers and calculates with those.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ovis_model.network.kernels import FP8, MAX_FP8, MIN_MAGNITUDE, Rotary

HEAD_BLOCK = 4096
"""Words of the visual vocabulary that a program has in registers at once: 8 values in each of 512 threads."""


_MAX_FP8, _MIN_MAGNITUDE = tl.constexpr(MAX_FP8), tl.constexpr(MIN_MAGNITUDE)


class TritonKernels:
    """Kernels for contiguous rows of half precision; gradients are not recorded."""

    pads_columns = True

    def apply_rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Read each row once and write it once."""
        assert x.is_contiguous(), "a norm needs contiguous rows"
        out, size = torch.empty_like(x), x.shape[-1]
        self.launch(_rms_norm_kernel, x.numel() // size, x, weight, out, size, eps, **_fit_block(size))
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Overwrite `x` with the sum."""
        assert x.is_contiguous() and residual.is_contiguous(), "a norm needs contiguous rows"
        out, size = torch.empty_like(x), x.shape[-1]
        rows = x.numel() // size
        self.launch(_add_rms_norm_kernel, rows, x, residual, weight, out, size, eps, **_fit_block(size))
        return x, out

    def apply_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Overwrite `gate`; both may be columns of a wider matrix."""
        size, block = gate.shape[-1], 1024
        grid = (gate.numel() // size, triton.cdiv(size, block))
        self.launch(_gate_kernel, grid, gate, up, gate.stride(-2), up.stride(-2), size, BLOCK=block)
        return gate

    def rotate(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Read heads that may be some of a wider matrix; the result is contiguous."""
        batch, length, heads, head_dim = x.shape
        out = torch.empty((batch, length, heads, head_dim), dtype=x.dtype, device=x.device)
        blocks = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(head_dim // 2)}
        stride = x.flatten(0, 1).stride(0)  # of a token; a dimension of size 1 may have any stride
        self.launch(_rotate_kernel, batch * length, x, *rotary, out, stride, heads, head_dim // 2, **blocks)
        return out

    def compute_word_probabilities(self, words: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Overwrite `words`; a row is read three times, the last two from the cache, and written once."""
        assert words.is_contiguous(), "the head's norm needs contiguous rows"
        width = words.shape[-1]
        rows, block = words.numel() // width, min(HEAD_BLOCK, triton.next_power_of_2(width))
        sizes = (norm.weight.shape[0], width, norm.eps)
        self.launch(
            _head_kernel, rows, words, norm.weight, norm.bias, *sizes, BLOCK=block, num_warps=max(1, block >> 8)
        )
        return words

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Read rows, which may be columns of a wider matrix, once; values and scales are contiguous."""
        rows, size = x.shape
        values = torch.empty(rows, size, dtype=FP8, device=x.device)
        scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
        self.launch(_quantize_kernel, rows, x, values, scales, x.stride(0), size, **_fit_block(size))
        return values, scales

    def launch(self, kernel: Any, grid: int | tuple[int, int], *args: Any, **options: Any) -> None:
        """Launch `kernel` with so many programs; none for an empty input."""
        programs = (grid,) if isinstance(grid, int) else grid
        if programs[0]:
            kernel[programs](*args, **options)


def _fit_block(size: int) -> dict[str, int]:
    """Return the block that holds a row, with warps for at most 16 values per thread."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block >> 9))}


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    here = tl.program_id(0).to(tl.int64) * size + at
    x = tl.load(x_ptr + here, mask=at < size, other=0.0).to(tl.float32)
    _store_norm(x, weight_ptr, out_ptr, here, at, size, eps)


@triton.jit
def _add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    here = tl.program_id(0).to(tl.int64) * size + at
    x = tl.load(x_ptr + here, mask=at < size, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + here, mask=at < size, other=0.0).to(tl.float32)
    total = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + here, total, mask=at < size)
    _store_norm(total.to(tl.float32), weight_ptr, out_ptr, here, at, size, eps)


@triton.jit
def _store_norm(x, weight_ptr, out_ptr, here, at, size, eps):
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    normalized = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, (weight * normalized).to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + at, mask=at < size, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(gate_ptr + row * gate_stride + at, (silu * up).to(gate_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token, head, at = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (at < half)
    source = x_ptr + token * stride + head * 2 * half + at
    target = out_ptr + (token * heads + head) * 2 * half + at
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    angle = token * 2 * half + at
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_ptr + angle, mask=at < half, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + angle + half, mask=at < half, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + angle, mask=at < half, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + angle + half, mask=at < half, other=0.0).to(tl.float32)
    tl.store(target, ((first * cos_first).to(dtype).to(tl.float32) + second * sin_first).to(dtype), mask=mask)
    tl.store(target + half, ((second * cos_second).to(dtype).to(tl.float32) + first * sin_second).to(dtype), mask=mask)


@triton.jit
def _quantize_kernel(x_ptr, values_ptr, scales_ptr, stride, size, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + at, mask=at < size, other=0.0).to(tl.float32)
    # Divided as IEEE 754 says, like the reference, because an approximation rounds to other float8 numbers.
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), _MIN_MAGNITUDE), _MAX_FP8)
    values = tl.div_rn(x, scale).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * size + at, values, mask=at < size)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _head_kernel(words_ptr, weight_ptr, bias_ptr, size, width, eps, BLOCK: tl.constexpr):
    row_ptr = words_ptr + tl.program_id(0).to(tl.int64) * width
    mean, scale = _measure_row(row_ptr, size, eps, BLOCK)
    largest, total = -float("inf"), 0.0
    for start in range(0, size, BLOCK):
        words = _load_words(row_ptr, weight_ptr, bias_ptr, start, size, mean, scale, BLOCK)
        new_largest = tl.maximum(largest, tl.max(words, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(words - new_largest), 0)
        largest = new_largest
    for start in range(0, width, BLOCK):
        words = _load_words(row_ptr, weight_ptr, bias_ptr, start, size, mean, scale, BLOCK)
        at = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + at, (tl.exp(words - largest) / total).to(words_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def _measure_row(row_ptr, size, eps, BLOCK: tl.constexpr):
    """Return the mean and 1 / deviation; blocks are combined by Chan's formula, so that no digits cancel."""
    mean, squares = 0.0, 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.minimum(size - start, BLOCK).to(tl.float32)
        x = tl.load(row_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        own_mean = tl.sum(x, 0) / count
        apart = tl.where(at < size, x - own_mean, 0.0)
        shift = own_mean - mean
        squares += tl.sum(apart * apart, 0) + shift * shift * start * count / (start + count)
        mean += shift * count / (start + count)
    return mean, tl.rsqrt(squares / size + eps)


@triton.jit
def _load_words(row_ptr, weight_ptr, bias_ptr, start, size, mean, scale, BLOCK: tl.constexpr):
    """Return normalized words in float32, rounded as the reference does; -inf in the padding."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    words = ((x - mean) * scale * weight + bias).to(row_ptr.dtype.element_ty).to(tl.float32)
    return tl.where(at < size, words, -float("inf"))
