"""Run the CPU stage without Ray: from INPUT to the rows that `Generate` receives."""

from __future__ import annotations

import numpy as np

from pipelines.cluster.attempts import AttemptCounts
from pipelines.config import RunConfig
from pipelines.media.frame_selection import Encoder
from pipelines.output.manifest import write_manifest
from pipelines.preprocess import Preprocess
from pipelines.rows import Batch, PreparedRow
from pipelines.sources import list_rows


def make_stage(config: RunConfig, encoder: Encoder | None = None) -> tuple[Preprocess, Batch]:
    """List INPUT into OUTPUT's manifest; return the stage and the one unit that holds all rows."""
    with list_rows(config, config.questionnaire) as listing:
        write_manifest(config.output, listing.read_tables())
    stage = Preprocess(config.output, config.model, None, config, config.questionnaire, AttemptCounts(), encoder)
    return stage, {"start": np.array([0]), "stop": np.array([listing.num_rows])}


def prepare_rows(config: RunConfig, encoder: Encoder | None = None) -> list[PreparedRow]:
    """Return all rows of INPUT after the stage."""
    stage, units = make_stage(config, encoder)
    return run_stage(stage, units)


def run_stage(stage: Preprocess, units: Batch) -> list[PreparedRow]:
    """Return the prepared rows of these units."""
    return [row for batch in stage(units) for row in PreparedRow.from_columns(batch)]
