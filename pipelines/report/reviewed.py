"""Summarize what people decided: accuracy of each task with a 95 % interval, and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.output.decisions import Decision, read_decisions
from pipelines.report.counts import Calibration

Json = dict[str, Any]

_Z = 1.959964  # of a normal distribution, for 95 %


def summarize_review(output: str) -> list[Json]:
    """Return the figures of each task that has decisions; an empty list if there are none."""
    by_task: dict[str, list[Decision]] = {}
    for decision in read_decisions(output).values():
        by_task.setdefault(decision.task, []).append(decision)
    return [_summarize(task, decisions) for task, decisions in sorted(by_task.items())]


def _summarize(task: str, decisions: Sequence[Decision]) -> Json:
    right = sum(decision.is_right for decision in decisions)
    low, high = compute_interval(right, len(decisions))
    known = [decision for decision in decisions if math.isfinite(decision.confidence)]
    calibration = Calibration()
    calibration.add(
        np.clip(np.array([decision.confidence for decision in known], np.float64), 0, 1),
        np.array([decision.is_right for decision in known], np.bool_),
    )
    return {
        "task": task,
        "reviewed": len(decisions),
        "right": right,
        "accuracy": right / len(decisions),
        "low": low,
        "high": high,
        "calibration": calibration.to_json() if known else None,
    }


def compute_interval(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927), which stays within 0 and 1."""
    share, weight = right / total, _Z**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)
