"""Choose what lists the rows of a run: INPUT, the cuts of its videos, or a part of a list of several drivers."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial

from pipelines.checks import resolve_model_paths
from pipelines.cluster.ray_session import open_ray_session
from pipelines.config import RunConfig
from pipelines.cutting.run import list_cut_rows
from pipelines.output.lease import Lease
from pipelines.output.parts import ListedRows, MakeLister, RowList, extend_list, open_part, prepare_list
from pipelines.plan import plan_run
from pipelines.sources import KnownRows, Listing, list_rows
from pipelines.tasks.questionnaire import Questionnaire

logger = logging.getLogger(__name__)


def choose_lister(config: RunConfig, session: ExitStack) -> tuple[RunConfig, MakeLister]:
    """Return the configuration of the OUTPUT to write, and what lists its rows; with --shard those of a part.

    Ray starts within `session` if videos are to be cut.
    """
    if config.shard is None:
        return config, _choose_input_lister(config, session)
    part, listed = open_part(config, _choose_input_lister(config, session))
    return config.model_copy(update={"output": part.output}), lambda _: partial(_list_part, listed)


def list_beforehand(config: RunConfig) -> RowList:
    """List the rows for drivers with --shard that come later; with --extend, add those that the list lacks."""
    with ExitStack() as session:
        config = resolve_model_paths(config)  # as the drivers do, which compare options
        make_lister = _choose_input_lister(config, session)
        return extend_list(config, make_lister) if config.extend else prepare_list(config, make_lister)


def _choose_input_lister(config: RunConfig, session: ExitStack) -> MakeLister:
    return partial(partial, _list_cut_rows, session) if config.cuts_videos else lambda _: list_rows


def _list_part(
    listed: ListedRows, config: RunConfig, questionnaire: Questionnaire, known: KnownRows | None = None, *, output: str
) -> ListedRows:
    """Return the rows of a part, those after the `known` ones if it is extended."""
    new = listed.skip(len(known or ()))
    if known is not None and not new.num_rows:
        logger.warning("the list has no further rows for this part; `ovis2 list ... --extend` adds those of INPUT")
    return new


def _list_cut_rows(
    session: ExitStack,
    lease: Lease,
    config: RunConfig,
    questionnaire: Questionnaire,
    known: KnownRows | None = None,
    *,
    output: str,
) -> Listing:
    """Return `list_cut_rows` with Ray started, after the checks of what the run itself needs of the cluster."""
    session.enter_context(open_ray_session())
    plan_run(config, 1)
    return list_cut_rows(config, questionnaire, known, output=output, lease=lease)
