"""Measure the peak rates of this machine, with which `ovis_model.engine.cost` gives the least time of rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from ovis_model.engine.cost import Ceilings


@cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the rates of a large matrix product and of a large copy (bytes read + written), the best of five each.

    The first result for a device is kept.
    """
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s, copy_s = [], []
    for _ in range(6):
        product_s.append(_measure_s(lambda: torch.mm(a, a), device))
        copy_s.append(_measure_s(lambda: target.copy_(source), device))
    return Ceilings(2 * side**3 / min(product_s[1:]), 2 * source.numel() / min(copy_s[1:]))


def _measure_s(work: Callable[[], object], device: torch.device) -> float:
    started_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
