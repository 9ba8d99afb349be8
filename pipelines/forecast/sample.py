"""Prepare some rows in this process: what cannot be read, tiles, prompt tokens, and CPU time per row."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.cluster.attempts import AttemptCounts
from pipelines.config import RunConfig
from pipelines.forecast.contents import describe_quantiles, spread
from pipelines.monitoring.error_reasons import normalize_reason
from pipelines.preprocess import Preprocess
from pipelines.rows import PreparedRow

Json = dict[str, Any]

MAX_SAMPLE, MAX_SAMPLE_S = 200, 60.0


@dataclass(frozen=True)
class PreparedSample:
    """Rows that were prepared, and the CPU seconds that each took, in all threads of this process."""

    rows: list[PreparedRow]
    cpu_s: list[float]

    @property
    def ok(self) -> list[PreparedRow]:
        """The rows that can be generated."""
        return [row for row in self.rows if not row.stage]

    @property
    def mean_cpu_s(self) -> float:
        """Mean CPU seconds per row; the first one, which loads what the others use, counts only if it is alone."""
        return float(np.mean(self.cpu_s[1:] or self.cpu_s))

    def describe(self) -> Json:
        """Return counts, reasons and quantiles for JSON."""
        failed = [normalize_reason(row.stage, row.error) for row in self.rows if row.stage]
        ok = self.ok
        return {
            "rows": len(self.rows),
            "unreadable": len(failed),
            "reasons": {reason: failed.count(reason) for reason in dict.fromkeys(failed)},
            "images_per_row": describe_quantiles(np.array([row.num_images for row in ok])),
            "tiles_per_row": describe_quantiles(np.array([row.num_tiles for row in ok])),
            "prompt_tokens_per_row": describe_quantiles(np.array([row.num_prompt_tokens for row in ok])),
            "cpu_s_per_row": describe_quantiles(np.array(self.cpu_s[1:] or self.cpu_s)),
        }


def prepare_sample(config: RunConfig, place: str, revision: str | None, num_rows: int) -> PreparedSample:
    """Prepare up to MAX_SAMPLE rows of the manifest in `place`, spread over it, for at most MAX_SAMPLE_S.

    Frames that an encoder would choose are spread evenly instead, which costs nearly the same on a CPU.
    """
    uniform = config.model_copy(update={"frame_selection": "uniform"}) if config.needs_encoder else config
    private = config.allow_private_addresses
    stage = Preprocess(
        place, config.model, revision, uniform, config.questionnaire, AttemptCounts(), allow_private_addresses=private
    )
    rows: list[PreparedRow] = []
    cpu_s: list[float] = []
    ends_s = time.monotonic() + MAX_SAMPLE_S
    for number in np.random.default_rng(0).permutation(spread(num_rows, MAX_SAMPLE)).tolist():
        if rows and time.monotonic() > ends_s:
            break
        started_s = time.process_time()
        for batch in stage({"start": np.array([number]), "stop": np.array([number + 1])}):
            rows += PreparedRow.from_columns(batch)
        cpu_s.append(time.process_time() - started_s)
    return PreparedSample(rows, cpu_s)
