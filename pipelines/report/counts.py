"""Count values in bounded memory: histograms and calibration."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]

_MAX_BINS = 32
_SMALLEST_WIDTH = 2.0**-40  # of a bin of fractions, before the range is known


class _Numbers:
    """Finite numbers, of which sum, smallest and largest are known; a histogram adds how often each occurs."""

    def __init__(self) -> None:
        self._sum, self._smallest, self._largest = 0, math.inf, -math.inf

    def add(self, values: NDArray[Any]) -> None:
        """Count an array of values; those that are not finite are ignored."""
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self._sum += values.sum().item()
        self._smallest = min(self._smallest, values.min().item())
        self._largest = max(self._largest, values.max().item())
        self._widen()
        self._count(values)

    def _widen(self) -> None:
        """Make room for the smallest and the largest value; a histogram with fixed bins needs none."""

    def _count(self, values: NDArray[Any]) -> None:
        raise NotImplementedError


class Histogram(_Numbers):
    """A histogram of values >= 0 in bins of equal width; the last bin includes all larger values."""

    def __init__(self, num_bins: int, width: float) -> None:
        super().__init__()
        self._bins, self._width = np.zeros(num_bins, np.int64), width

    def _count(self, values: NDArray[Any]) -> None:
        places = np.minimum(values / self._width, len(self._bins) - 1).astype(np.int64)
        self._bins += np.bincount(places, minlength=len(self._bins))

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


class NumberHistogram(_Numbers):
    """A histogram of any numbers, exact for any number of them, in at most 33 bins.

    The bins' width is a power of two that grows with the range, and their ends are multiples of it.
    """

    def __init__(self, *, is_whole: bool) -> None:
        super().__init__()
        self._width = 1.0 if is_whole else _SMALLEST_WIDTH
        self._counts: Counter[int] = Counter()  # {place of the bin: values}

    def _count(self, values: NDArray[Any]) -> None:
        places, counts = np.unique(np.floor(values / self._width).astype(np.int64), return_counts=True)
        self._counts.update(dict(zip(places.tolist(), counts.tolist(), strict=True)))

    def _widen(self) -> None:
        """Join pairs of bins until few hold all values, and until their places are whole numbers of a float."""
        while (
            self._largest - self._smallest >= _MAX_BINS * self._width
            or max(-self._smallest, self._largest) >= self._width * 2.0**50
        ):
            self._width *= 2
            joined: Counter[int] = Counter()
            for place, count in self._counts.items():
                joined[place // 2] += count
            self._counts = joined

    def to_json(self) -> Json | None:
        """Return the bins, the start of the first, their width, mean, minimum and maximum; None without values."""
        if not self._counts:
            return None
        first, last = min(self._counts), max(self._counts)
        return {
            "bins": [self._counts[place] for place in range(first, last + 1)],
            "start": first * self._width,
            "width": self._width,
            "mean": self._sum / self._counts.total(),
            "min": self._smallest,
            "max": self._largest,
        }


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
