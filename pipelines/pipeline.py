"""Run a job: manifest minus ledger -> Preprocess -> Generate -> output files, until no row is missing."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

import pyarrow as pa

from ovis_model.inputs.resample import load_resampler
from ovis_model.wording import count_nouns
from pipelines import schema
from pipelines.checks import check_model, describe_models, resolve_model_paths
from pipelines.cluster.attempts import RemoteAttempts, start_attempt_counts
from pipelines.cluster.ray_session import (
    configure_ray_data,
    open_ray_session,
    request_gpus,
    stream_tables,
    translate_ray_errors,
)
from pipelines.cluster.resources import BATCH_BYTES, MAX_BLOCKS
from pipelines.cluster.watch import Watch
from pipelines.config import RunConfig
from pipelines.errors import ClusterChanged, EngineNotStarted, LeaseLost, ResourceError, RowsLost, RunError, StoreFault
from pipelines.generate import EngineFactory, Generate, Replica, load_engine
from pipelines.media.frame_encoder import run_encoders
from pipelines.media.saving import check_saved_frames
from pipelines.monitoring.error_reasons import ErrorMonitor
from pipelines.monitoring.phases import Phases
from pipelines.monitoring.progress import RunProgress
from pipelines.output.compact import drop_error_rows
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, Ranges, count_rows, split_ranges
from pipelines.output.manifest import KeptColumns
from pipelines.output.monitor import RunMonitor
from pipelines.output.parts import check_undivided
from pipelines.output.run_record import (
    Lister,
    PreparedRun,
    Run,
    acquire_lease,
    check_dtype,
    note_unchanged,
    prepare_run,
)
from pipelines.output.sink import Sink, remove_temporaries
from pipelines.plan import Plan, plan_run
from pipelines.preprocess import Preprocess
from pipelines.row_lists import choose_lister
from pipelines.storage import store
from pipelines.storage.preflight import check_stores

MAX_PASSES = 3  # the second retries rows that were lost with a node; rows missing after the third indicate a bug

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Row counts of the whole output; seconds and rates of this run only."""

    rows: int
    ok: int
    error: int
    skipped_done: int
    seconds: float
    rows_per_s: float
    output_tokens_per_s: float
    output: str


def run_pipeline(config: RunConfig, *, make_engine: EngineFactory = load_engine) -> Summary:
    """Write the rows that are missing in `config.output` and return the counts.

    Raise ValueError for mistakes of usage; OUTPUT is unchanged then. Raise StageFailed, StoreFault,
    EverythingFails, ClusterChanged or RowsLost if the run has to stop.
    """
    started_s, phases = time.monotonic(), Phases()
    with note_unchanged():
        check_stores(filter(None, (*config.input, config.output, config.model, config.save_frames)))
        config = resolve_model_paths(config)
        check_saved_frames(config)
        check_model(config)
        models = describe_models(config)
    with ExitStack() as session:
        config, make_lister = choose_lister(config, session)
        lease = session.enter_context(acquire_lease(config.output))
        run, ledger, plan = _start_run(config, models, make_lister(lease), lease, session, phases)
        try:
            ledger, progress = _write_missing_rows(config, run, ledger, plan, lease, phases, make_engine)
        except BaseException:
            with suppress(OSError, StoreFault, LeaseLost):
                lease.check()
                run.update(status="stopped")
            raise
        lease.check()
        run.update(status="finished", counts={"ok": run.num_rows - ledger.num_errors, "error": ledger.num_errors})
    return _summarize(run, ledger, progress, time.monotonic() - started_s)


def _start_run(
    config: RunConfig,
    models: dict[str, str | None],
    lister: Lister,
    lease: Lease,
    session: ExitStack,
    phases: Phases,
) -> tuple[Run, Ledger, Plan | None]:
    """Change OUTPUT only after all checks, those of the cluster too. Start Ray only if rows are missing."""
    with note_unchanged():
        if config.shard is None:
            check_undivided(store.make_absolute(config.output))
        prepared = prepare_run(config, models, lister)
    with prepared:
        num_rows = count_rows(prepared.missing) + config.retry_errors * prepared.ledger.num_errors
        if not num_rows:
            logger.warning(_describe_done(prepared))
            return prepared.start(lease), prepared.ledger, None
        phases.begin("start")
        with note_unchanged():
            session.enter_context(open_ray_session())
            plan = plan_run(config, num_rows)
            check_dtype(prepared.output, prepared.record, plan.dtype)
        return prepared.start(lease, settled_dtype=plan.dtype, status="running", counts=None), prepared.ledger, plan


def _describe_done(prepared: PreparedRun) -> str:
    done = count_nouns(prepared.record["num_rows"], "row is", "rows are")
    failed = count_nouns(prepared.ledger.num_errors, "error row")
    errors = f", {failed} among them; --retry-errors runs error rows again" if prepared.ledger.num_errors else ""
    return f"nothing to do: {done} in OUTPUT already{errors}"


def _write_missing_rows(
    config: RunConfig,
    run: Run,
    ledger: Ledger,
    plan: Plan | None,
    lease: Lease,
    phases: Phases,
    make_engine: EngineFactory,
) -> tuple[Ledger, RunProgress]:
    remove_temporaries(run.data_uri)
    if config.retry_errors:
        logger.warning("retrying %s", count_nouns(drop_error_rows(run.output, lease), "error row"))
        ledger = Ledger.read(run.data_uri)
    with RunProgress(run.num_rows, count_rows(ledger.done)) as progress:
        if plan is not None:
            monitor = RunMonitor(run.output, lease, progress, phases)
            try:
                _write_in_passes(config, run, ledger, plan, lease, monitor, make_engine)
            except EngineNotStarted as error:
                if progress.num_new:
                    raise ClusterChanged(f"a replica does not start again: {error}") from error
                raise
            finally:
                run.note_session(monitor.finish())
    return ledger, progress


def _write_in_passes(
    config: RunConfig,
    run: Run,
    ledger: Ledger,
    plan: Plan,
    lease: Lease,
    monitor: RunMonitor,
    make_engine: EngineFactory,
) -> None:
    kept = KeptColumns(run.output)
    with ErrorMonitor(config.stop_error_rate) as reasons:
        for number in range(MAX_PASSES):
            if missing := ledger.find_missing(run.num_rows):
                plan = _plan_again(config, run, missing) if number else plan
                with (
                    Sink(run.data_uri, ledger, lease, rows_per_file=config.rows_per_file, kept=kept) as sink,
                    closing(stream_results(config, run, plan, missing, monitor, make_engine)) as stream,
                ):
                    for results in stream:
                        with monitor.handle_rows():
                            new = sink.add(results)
                            monitor.progress.add(new)
                            reasons.add(new)
    monitor.begin_check()
    written = Ledger.read(run.data_uri)  # read back from the store, not taken from memory
    if missing := written.find_missing(run.num_rows):
        raise RowsLost(
            f"{count_rows(missing)} of {count_nouns(run.num_rows, 'row')} are missing after {MAX_PASSES} passes: "
            f"{missing[:5]}"
        )


def _plan_again(config: RunConfig, run: Run, missing: Ranges) -> Plan:
    """Plan the rows that were lost with a node. Raise ClusterChanged if the remaining nodes do not fit the run."""
    try:
        plan = plan_run(config, count_rows(missing))
        check_dtype(run.output, run.record, plan.dtype)
    except (ResourceError, RunError) as error:
        lost = count_nouns(count_rows(missing), "row was", "rows were")
        raise ClusterChanged(f"{lost} lost with a node, and {error}") from error
    return plan


def stream_results(
    config: RunConfig, run: Run, plan: Plan, missing: Ranges, monitor: RunMonitor, make_engine: EngineFactory
) -> Generator[pa.Table, None, None]:
    """Run the missing rows and yield tables of the result schema as replicas finish them; close it afterwards."""
    import ray
    from ray.data import ActorPoolStrategy

    print(plan, file=sys.stderr)
    load_resampler()  # for its warning: users see the driver's log, not that of the actors
    configure_ray_data(BATCH_BYTES)
    pools, sizes, questionnaire, found = plan.pools, plan.sizes, config.questionnaire, run.record["model"]
    model = config.model, found["revision"]
    shape = pools.threads_per_replica, pools.tensor_parallel
    replica = Replica(*model, plan.dtype, pools.device, *shape, quantization=config.quantization, engine=config.engine)
    # A unit is only two numbers, so Ray needs no read tasks, which the pools could starve of CPUs.
    units = [unit._asdict() for unit in split_ranges(missing, sizes.rows_per_unit)]
    with (
        translate_ray_errors(),
        run_encoders(config.frame_encoder, found.get("frame encoder revision"), plan.encoders) as encoder,
        request_gpus([pools.replica_gpus] * pools.num_replicas if pools.waits_for_gpus else []),
    ):
        of_preprocessors, of_replicas = start_attempt_counts("preprocessor", "replica")
        attempts = {"preprocessor": of_preprocessors, "replica": of_replicas}
        watch = Watch(pools, attempts, monitor.observe, autoscale=config.autoscale)
        rows = (
            ray.data.from_items(units, override_num_blocks=min(len(units), MAX_BLOCKS))
            .map_batches(
                Preprocess,
                fn_constructor_args=(
                    run.output,
                    *model,
                    config,
                    questionnaire,
                    of_preprocessors,
                    encoder,
                ),
                fn_constructor_kwargs={
                    "save_frames": config.save_frames,
                    "allow_private_addresses": config.allow_private_addresses,
                },
                batch_size=1,
                num_cpus=pools.preprocessor_cpus,
                compute=ActorPoolStrategy(size=pools.num_preprocessors),
                **plan.node_preference,
            )
            .map_batches(
                Generate,
                fn_constructor_args=(questionnaire, replica, make_engine, of_replicas),
                fn_constructor_kwargs={"max_calls": sizes.calls_per_replica},
                batch_size=sizes.rows_per_batch,
                num_cpus=pools.replica_cpus,
                num_gpus=pools.replica_gpus,
                compute=ActorPoolStrategy(
                    min_size=pools.num_replicas,
                    max_size=None if pools.may_grow else pools.num_replicas,
                    max_concurrent_calls_per_actor=sizes.calls_per_replica,
                    enable_true_multi_threading=True,
                    max_tasks_in_flight_per_actor=sizes.calls_per_replica + 1,
                ),
            )
        )
        with watch, closing(stream_tables(rows)) as results:
            yield from _add_kept_rows(results, of_replicas, schema.build_result_schema(questionnaire.schema))


def _add_kept_rows(
    results: Iterable[pa.Table], attempts: RemoteAttempts, result_schema: pa.Schema
) -> Iterator[pa.Table]:
    """Yield `results`; if they end with an error, also the rows that were tried alone and wait for their batch."""
    try:
        for table in results:
            yield table.cast(result_schema)
    except (Exception, KeyboardInterrupt):
        yield from attempts.read_kept()
        raise


def _summarize(run: Run, ledger: Ledger, progress: RunProgress, seconds: float) -> Summary:
    return Summary(
        rows=run.num_rows,
        ok=run.num_rows - ledger.num_errors,
        error=ledger.num_errors,
        skipped_done=progress.num_done,
        seconds=round(seconds, 3),
        rows_per_s=round(progress.num_new / seconds, 3),
        output_tokens_per_s=round(progress.num_tokens / seconds, 3),
        output=run.output,
    )
