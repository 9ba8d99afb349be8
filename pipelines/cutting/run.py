"""Find the cuts of all videos of INPUT in a run of its own in OUTPUT/cuts, which resumes where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

import pyarrow as pa

from ovis_model.wording import count_nouns
from pipelines.cluster.attempts import start_attempt_counts
from pipelines.cluster.ray_session import configure_ray_data, stream_tables, translate_ray_errors
from pipelines.cluster.resources import BATCH_BYTES, MAX_BLOCKS, Hardware
from pipelines.config import RunConfig, SourceOptions
from pipelines.cutting.listing import list_parts
from pipelines.cutting.stage import CUTS, FindCuts
from pipelines.errors import RowsLost, RunError
from pipelines.media.video.shots import Cutting
from pipelines.monitoring.error_reasons import ErrorMonitor
from pipelines.monitoring.progress import Progress
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, Ranges, count_rows, split_ranges
from pipelines.output.run_record import Lister, PreparedRun, Run, prepare_run, read_record
from pipelines.output.sink import Sink, remove_temporaries
from pipelines.sources import KnownRows, Listing, list_rows
from pipelines.storage import store
from pipelines.tasks.questionnaire import Questionnaire

PLACE = "cuts"
_MAX_PASSES = 3  # as of the run itself: the second finds the cuts that were lost with a node
_MAX_ROWS_PER_UNIT = 64

Stream = Callable[[RunConfig, Run, Ranges], Generator[pa.Table, None, None]]
"""Yields the rows of CUTS with these row numbers, in any order."""


def list_cut_rows(
    config: RunConfig,
    questionnaire: Questionnaire,
    known: KnownRows | None = None,
    *,
    output: str,
    lease: Lease,
    stream: Stream | None = None,
) -> Listing:
    """List the rows of INPUT, with a row for each part of a video, except those that are `known`; close it afterwards.

    The cuts are found first, and saved in OUTPUT/cuts. Raise what `list_rows` and a run raise.
    """
    with _note_saved(), _prepare(config, output) as prepared:
        run, ledger = prepared.start(lease), prepared.ledger
        remove_temporaries(run.data_uri)
        if prepared.missing:
            _write_missing_cuts(config, run, ledger, lease, stream or _stream_from_ray)
    return list_parts(config, run, known or KnownRows())


def _prepare(config: RunConfig, output: str) -> PreparedRun:
    """Prepare the run in OUTPUT/cuts: a new one, or the one that was stopped before a run used its cuts."""
    place = store.join(output, PLACE)
    record, user = read_record(place), read_record(output)
    is_used = bool(record and user and user["started_at"] >= record["started_at"])
    options = {"output": place, "extend": config.extend and record is not None, "retry_errors": False, "shard": None}
    # The command may be repeated with --overwrite until the run begins: then the cuts found so far are kept.
    resumed = config.model_copy(update={**options, "overwrite": config.overwrite and is_used})
    try:
        return prepare_run(resumed, {}, _list_whole_rows(output))
    except RunError:
        if not config.overwrite or resumed.overwrite:
            raise
        return prepare_run(resumed.model_copy(update={"overwrite": True}), {}, _list_whole_rows(output))


def _list_whole_rows(output: str) -> Lister:
    """Return `list_rows` for the files that OUTPUT does not hold."""

    def list_them(config: RunConfig, questionnaire: Questionnaire, known: KnownRows | None = None, **_: str) -> Listing:
        return list_rows(config, questionnaire, known, output=output)

    return list_them


@contextmanager
def _note_saved() -> Iterator[None]:
    """Add to any exception the note that the cuts found so far are saved."""
    try:
        yield
    except BaseException as error:
        error.add_note("The cuts found so far are saved; run the same command again")
        raise


def _write_missing_cuts(config: RunConfig, run: Run, ledger: Ledger, lease: Lease, stream: Stream) -> None:
    with (
        Progress("rows searched for cuts", run.num_rows, count_rows(ledger.done)) as progress,
        ErrorMonitor(config.stop_error_rate) as reasons,
    ):
        for _ in range(_MAX_PASSES):
            if missing := ledger.find_missing(run.num_rows):
                with (
                    Sink(run.data_uri, ledger, lease, rows_per_file=config.rows_per_file) as sink,
                    closing(stream(config, run, missing)) as tables,
                ):
                    for results in tables:
                        new = sink.add(results)
                        progress.advance(len(new))
                        reasons.add(new)
    if missing := ledger.find_missing(run.num_rows):
        number = count_nouns(count_rows(missing), "row")
        raise RowsLost(f"the cuts of {number} are missing after {_MAX_PASSES} passes: {missing[:5]}")


def _stream_from_ray(config: RunConfig, run: Run, missing: Ranges) -> Generator[pa.Table, None, None]:
    import ray
    from ray.data import ActorPoolStrategy

    configure_ray_data(BATCH_BYTES)
    num_actors = max(1, int(Hardware.detect().cpus))
    units = [unit._asdict() for unit in split_ranges(missing, _choose_unit(count_rows(missing), num_actors))]
    [attempts] = start_attempt_counts("cutter")
    with translate_ray_errors():
        tables = ray.data.from_items(units, override_num_blocks=min(len(units), MAX_BLOCKS)).map_batches(
            FindCuts,
            fn_constructor_args=(run.output, make_cutting(config), attempts),
            fn_constructor_kwargs={"allow_private_addresses": config.allow_private_addresses},
            batch_size=1,
            num_cpus=1,
            compute=ActorPoolStrategy(size=min(num_actors, len(units))),
        )
        with closing(stream_tables(tables)) as stream:
            for table in stream:
                yield table.cast(CUTS)


def make_cutting(options: SourceOptions) -> Cutting:
    """Return where the options ask to cut videos."""
    return Cutting(options.split == "shots", options.min_shot_s, options.window_s)


def _choose_unit(num_rows: int, num_actors: int) -> int:
    """Return the rows per call: a power of two, so that units end at row groups of the manifest; few, as films last."""
    share = num_rows // (16 * num_actors)
    return 1 << max(0, min(share, _MAX_ROWS_PER_UNIT).bit_length() - 1)
