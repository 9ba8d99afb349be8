"""Count values in bounded memory: histograms and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]


class Histogram:
    """A histogram of values >= 0 in bins of equal width; the last bin includes all larger values, NaN is ignored."""

    def __init__(self, num_bins: int, width: float) -> None:
        self._bins, self._width = np.zeros(num_bins, np.int64), width
        self._sum, self._smallest, self._largest = 0, math.inf, -math.inf

    def add(self, values: NDArray[Any]) -> None:
        """Count an array of values."""
        values = values[~np.isnan(values)]
        if not len(values):
            return
        self._sum += values.sum().item()
        self._smallest = min(self._smallest, values.min().item())
        self._largest = max(self._largest, values.max().item())
        self._widen()
        places = np.minimum(values / self._width, len(self._bins) - 1).astype(np.int64)
        self._bins += np.bincount(places, minlength=len(self._bins))

    def _widen(self) -> None:
        """Make room for the largest value; a histogram with fixed bins needs none."""

    def to_json(self) -> Json | None:
        """Return the bins, their width, and the mean, minimum and maximum; None if nothing was added."""
        count = int(self._bins.sum())
        numbers = {"width": self._width, "mean": self._sum / max(1, count), "min": self._smallest, "max": self._largest}
        return {"bins": self._bins.tolist(), "start": 0, **numbers} if count else None


class Spread(Histogram):
    """A histogram of integers >= 0 in 32 bins, whose width, a power of two, grows with the largest value."""

    def __init__(self) -> None:
        super().__init__(num_bins=32, width=1)

    def _widen(self) -> None:
        while self._largest >= self._width * len(self._bins):
            halved = self._bins.reshape(-1, 2).sum(axis=1)
            self._bins = np.concatenate((halved, np.zeros_like(halved)))
            self._width *= 2

    def to_json(self) -> Json | None:
        """Return the histogram up to the bin of the largest value; None if nothing was added."""
        found = super().to_json()
        return found and {**found, "bins": found["bins"][: int(self._largest // self._width) + 1]}


def bin_integers(counts: Sequence[tuple[int, int]], num_bins: int = 32) -> Json | None:
    """Return the histogram of integers from (value, count), in at most `num_bins` bins; None without values."""
    if not counts:
        return None
    values = [value for value, _ in counts]
    start, stop = min(values), max(values) + 1
    width = -(-(stop - start) // num_bins)
    bins = [0] * -(-(stop - start) // width)
    for value, count in counts:
        bins[(value - start) // width] += count
    mean = sum(value * count for value, count in counts) / sum(bins)
    return {"bins": bins, "start": start, "width": width, "mean": mean, "min": start, "max": stop - 1}


class Calibration:
    """Accuracy by confidence in ten equal bins (Guo et al. 2017, On Calibration of Modern Neural Networks)."""

    NUM_BINS = 10

    def __init__(self) -> None:
        self._count, self._right = np.zeros(self.NUM_BINS, np.int64), np.zeros(self.NUM_BINS, np.int64)
        self._confidence = np.zeros(self.NUM_BINS)

    def add(self, confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> None:
        """Count answers: `confidence` is float64[N] within [0, 1], `is_right` is bool[N]."""
        places = np.minimum((confidence * self.NUM_BINS).astype(np.int64), self.NUM_BINS - 1)
        self._count += np.bincount(places, minlength=self.NUM_BINS)
        self._right += np.bincount(places[is_right], minlength=self.NUM_BINS)
        self._confidence += np.bincount(places, weights=confidence, minlength=self.NUM_BINS)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy, weighted by answers."""
        return float(np.abs(self._right - self._confidence).sum() / max(1, self._count.sum()))

    def to_json(self) -> Json:
        """Return the count, mean confidence and accuracy of each bin; the latter two are null if it is empty."""
        bins = zip(self._count.tolist(), self._confidence.tolist(), self._right.tolist(), strict=True)
        return {
            "bins": [
                {"count": n, "confidence": sure / n if n else None, "right": right / n if n else None}
                for n, sure, right in bins
            ],
            "right": int(self._right.sum()),
            "count": int(self._count.sum()),
            "expected_error": self.expected_error,
        }
