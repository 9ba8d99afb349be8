"""Measure the CPU time of this process and of all processes that it has started and that still run."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def measure_cpu_s() -> float:
    """Return the CPU seconds of this process and its descendants so far, from the kernel's scheduler (Linux)."""
    children = defaultdict(list)
    for directory in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(directory.name))
    pids = [os.getpid()]
    for pid in pids:
        pids += children[pid]
    return sum(map(_read_cpu_ns, pids)) / 1e9


def _read_cpu_ns(pid: int) -> int:
    total = 0
    for task in _PROC.glob(f"{pid}/task/*/schedstat"):
        with suppress(OSError):
            total += int(task.read_text().split()[0])
    return total
