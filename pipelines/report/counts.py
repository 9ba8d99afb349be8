"""Histograms and calibration in bounded memory, whatever the number of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]


class Spread:
    """A histogram of counts >= 0 whose bins are as wide as the largest needs: powers of two, at most 32 bins."""

    _NUM_BINS = 32

    def __init__(self) -> None:
        self._bins = np.zeros(self._NUM_BINS, np.int64)
        self._width, self._sum, self._smallest, self._largest = 1, 0, 0, 0

    def add(self, values: NDArray[np.int64]) -> None:
        if not len(values):
            return
        self._smallest = int(values.min()) if not self._bins.any() else min(self._smallest, int(values.min()))
        self._largest = max(self._largest, int(values.max()))
        self._sum += int(values.sum())
        while self._largest >= self._width * self._NUM_BINS:
            self._bins = np.concatenate(
                (self._bins.reshape(-1, 2).sum(axis=1), np.zeros(self._NUM_BINS // 2, np.int64))
            )
            self._width *= 2
        self._bins += np.bincount(values // self._width, minlength=self._NUM_BINS)

    def to_json(self) -> Json | None:
        """None if nothing was added."""
        count = int(self._bins.sum())
        if not count:
            return None
        used = self._bins[: self._largest // self._width + 1]
        return {
            "bins": used.tolist(),
            "start": 0,
            "width": self._width,
            "mean": self._sum / count,
            "min": self._smallest,
            "max": self._largest,
        }


class Histogram:
    """Of values within [start, stop) in equal bins; what lies outside counts in the first or last bin, NaN nowhere."""

    def __init__(self, start: float, stop: float, num_bins: int) -> None:
        self._start, self._width = start, (stop - start) / num_bins
        self._bins = np.zeros(num_bins, np.int64)
        self._sum, self._smallest, self._largest = 0.0, np.inf, -np.inf

    def add(self, values: NDArray[np.float64]) -> None:
        values = values[~np.isnan(values)]
        if not len(values):
            return
        places = np.clip((values - self._start) / self._width, 0, len(self._bins) - 1).astype(np.int64)
        self._bins += np.bincount(places, minlength=len(self._bins))
        self._sum += float(values.sum())
        self._smallest, self._largest = min(self._smallest, values.min()), max(self._largest, values.max())

    def to_json(self) -> Json | None:
        """None if nothing was added."""
        count = int(self._bins.sum())
        if not count:
            return None
        return {
            "bins": self._bins.tolist(),
            "start": self._start,
            "width": self._width,
            "mean": self._sum / count,
            "min": float(self._smallest),
            "max": float(self._largest),
        }


class Calibration:
    """Share right by confidence, in ten equal bins (Guo et al. 2017, On Calibration of Modern Neural Networks)."""

    NUM_BINS = 10

    def __init__(self) -> None:
        self._count, self._right = np.zeros(self.NUM_BINS, np.int64), np.zeros(self.NUM_BINS, np.int64)
        self._confidence = np.zeros(self.NUM_BINS)

    def add(self, confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> None:
        """float64[N] within [0, 1], bool[N]."""
        places = np.minimum((confidence * self.NUM_BINS).astype(np.int64), self.NUM_BINS - 1)
        self._count += np.bincount(places, minlength=self.NUM_BINS)
        self._right += np.bincount(places[is_right], minlength=self.NUM_BINS)
        self._confidence += np.bincount(places, weights=confidence, minlength=self.NUM_BINS)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean gap between confidence and share right, weighted by answers."""
        total = int(self._count.sum())
        return float(np.abs(self._right - self._confidence).sum() / total) if total else 0.0

    def to_json(self) -> Json:
        """A bin without answers has neither confidence nor a share right."""
        some = np.maximum(self._count, 1)
        bins = zip(self._count.tolist(), (self._confidence / some).tolist(), (self._right / some).tolist(), strict=True)
        return {
            "bins": [
                {"count": n, "confidence": confidence if n else None, "right": right if n else None}
                for n, confidence, right in bins
            ],
            "right": int(self._right.sum()),
            "count": int(self._count.sum()),
            "expected_error": self.expected_error,
        }
