"""Run the CPU stage without Ray: from INPUT to the rows that `Generate` receives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipelines.cluster.attempts import AttemptCounts
from pipelines.config import RunConfig
from pipelines.cutting.run import list_cut_rows, make_cutting
from pipelines.cutting.stage import FindCuts
from pipelines.media.frame_selection import Encoder
from pipelines.output.ledger import Ranges, split_ranges
from pipelines.output.manifest import write_manifest
from pipelines.output.run_record import Run, acquire_lease
from pipelines.preprocess import Preprocess
from pipelines.rows import Batch, PreparedRow
from pipelines.sources import Listing, list_rows
from pipelines.storage import store


def make_stage(config: RunConfig, encoder: Encoder | None = None) -> tuple[Preprocess, Batch]:
    """List INPUT into OUTPUT's manifest; return the stage and the one unit that holds all rows."""
    with list_input(config) as listing:
        write_manifest(config.output, listing.read_tables())
    arguments = (config.output, config.model, None, config, config.questionnaire, AttemptCounts(), encoder)
    stage = Preprocess(*arguments, save_frames=config.save_frames)
    return stage, {"start": np.array([0]), "stop": np.array([listing.num_rows])}


def list_input(config: RunConfig) -> Listing:
    """List INPUT; if videos are cut, find the cuts in this process."""
    if not config.cuts_videos:
        return list_rows(config, config.questionnaire)
    with acquire_lease(config.output) as lease:
        place = store.make_absolute(config.output)
        return list_cut_rows(config, config.questionnaire, output=place, lease=lease, stream=find_cuts_here)


def find_cuts_here(config: RunConfig, run: Run, missing: Ranges) -> Iterator[pa.Table]:
    """Yield what the stage FindCuts yields in an actor."""
    units = np.array([*split_ranges(missing, 4)])
    yield from FindCuts(run.output, make_cutting(config), AttemptCounts())({"start": units[:, 0], "stop": units[:, 1]})


def prepare_rows(config: RunConfig, encoder: Encoder | None = None) -> list[PreparedRow]:
    """Return all rows of INPUT after the stage."""
    stage, units = make_stage(config, encoder)
    return run_stage(stage, units)


def run_stage(stage: Preprocess, units: Batch) -> list[PreparedRow]:
    """Return the prepared rows of these units."""
    return [row for batch in stage(units) for row in PreparedRow.from_columns(batch)]
