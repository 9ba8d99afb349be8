"""Scrape the metrics of runs from a Ray node's port, as Prometheus does."""

from __future__ import annotations

import re
import threading
import urllib.request
from typing import Self

from pipelines.monitoring.metrics import METRICS

_SAMPLE = re.compile(r"^ray_(ovis2_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_EVERY_S = 0.5


class Scraper:
    """A context manager that collects {metric: the labels of its samples} until all metrics have been seen."""

    def __init__(self, port: int) -> None:
        self.found: dict[str, set[str]] = {}
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._scrape, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    def _scrape(self) -> None:
        while self.found.keys() != METRICS.keys() and not self._closed.wait(_EVERY_S):
            with urllib.request.urlopen(self._url, timeout=30) as answer:
                text = answer.read().decode()
            for name, labels, _ in _SAMPLE.findall(text):
                self.found.setdefault(name, set()).add(labels)
