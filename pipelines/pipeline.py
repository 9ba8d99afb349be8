"""The captioning job: manifest minus ledger -> Preprocess -> Generate -> files, until no row is missing."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ovis_model.checkpoint import describe_checkpoint, fetch_checkpoint, local_path
from ovis_model.config import OvisConfig
from ovis_model.grammar.guides import check
from ovis_model.inputs.processor import Processor
from ovis_model.sizing import check_tensor_parallel
from pipelines import schema
from pipelines.cluster.attempts import RemoteAttempts, start_attempt_counts
from pipelines.cluster.resources import (
    MAX_BLOCKS,
    Hardware,
    Pools,
    Sizes,
    asked_for_gpus,
    cause_of,
    configure_ray_data,
    last_line,
    plan_batches,
    plan_pools,
    plan_tensor_parallel,
    prefer_nodes_without,
    ray_session,
    settled_dtype,
)
from pipelines.config import RunConfig
from pipelines.errors import LeaseLost, RowsLost, StageFailed, StoreFault
from pipelines.generate import EngineFactory, Generate, Replica, load_engine
from pipelines.media.frame_encoder import EncoderPool, describe_encoder, plan_encoders, start_encoders
from pipelines.media.frame_selection import Encoder
from pipelines.monitoring.error_reasons import Reasons
from pipelines.monitoring.progress import RunProgress
from pipelines.output.compact import drop_error_rows
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, Ranges, count, split
from pipelines.output.manifest import KeptColumns
from pipelines.output.run_record import Run, hold_lease, open_run
from pipelines.output.sink import Sink, remove_temporaries
from pipelines.preprocess import Preprocess
from pipelines.tasks.task import Task

MAX_PASSES = 3  # a second one takes up rows that went missing with a node, a third proves that something is wrong

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Counts of the whole output; seconds and rates of this run."""

    rows: int
    ok: int
    error: int
    skipped_done: int
    seconds: float
    rows_per_s: float
    output_tokens_per_s: float
    output: str


def caption(config: RunConfig, *, make_engine: EngineFactory = load_engine) -> Summary:
    """Caption what is missing of the run in `config.output`.

    Raises ValueError (usage: before any replica starts), StageFailed, StoreFault, EverythingFails and RowsLost.
    """
    started_s = time.monotonic()
    places = {"model": local_path(config.model), "frame_encoder": local_path(config.frame_encoder)}
    config = config.model_copy(update=places)
    check_model(config)
    model = {**describe_checkpoint(config.model, config.revision), **describe_encoder(config)}
    with hold_lease(config.output) as lease:
        run = open_run(config, model)
        try:
            ledger, progress = _caption_run(config, run, lease, make_engine)
        except BaseException:
            with suppress(OSError, StoreFault, LeaseLost):
                lease.check()
                run.update(status="stopped")
            raise
        lease.check()
        run.update(status="finished", counts={"ok": run.num_rows - ledger.num_errors, "error": ledger.num_errors})
    return _summary(run, ledger, progress, time.monotonic() - started_s)


def _caption_run(config: RunConfig, run: Run, lease: Lease, make_engine: EngineFactory) -> tuple[Ledger, RunProgress]:
    remove_temporaries(run.data_uri)
    if config.retry_errors:
        run.update(status="running", counts=None)
        logger.warning("%d error rows are taken up again", drop_error_rows(run.output, lease))
    ledger = Ledger.read(run.data_uri)
    with RunProgress(run.num_rows, count(ledger.done)) as progress:
        if ledger.missing(run.num_rows):
            run.update(status="running")
            with ray_session():
                _caption_missing(config, run, ledger, lease, progress, make_engine)
    return ledger, progress


def check_model(config: RunConfig) -> None:
    """What can be known of the model and the options without weights. Raises ValueError."""
    processor = Processor.from_pretrained(config.model, config.revision)
    if config.tensor_parallel != "auto":
        check_tensor_parallel(processor.config.language, config.tensor_parallel)
    for task in config.asked:
        _check_task(task, processor)


def _check_task(task: Task, processor: Processor) -> None:
    params = task.sampling("", processor.answer_ids)
    for option in task.answer.options:
        if (read := processor.detokenize(processor.answer_ids(option))) != option:
            raise ValueError(f"{task.where}the model reads the choice {option!a} as {read!a}; write it so")
    if params.constraint is not None:
        try:
            check(params.constraint)
        except ValueError as error:
            raise ValueError(f"{task.where}{error}") from error
    if params.max_new_tokens >= processor.config.max_length:
        raise ValueError(
            f"{task.where}--max-new-tokens {params.max_new_tokens} leaves no room for a prompt in the model's "
            f"{processor.config.max_length} tokens; lower it"
        )


def _caption_missing(
    config: RunConfig, run: Run, ledger: Ledger, lease: Lease, progress: RunProgress, make_engine: EngineFactory
) -> None:
    kept = KeptColumns(run.output)
    reasons = Reasons(config.stop_error_rate)
    try:
        for _ in range(MAX_PASSES):
            if missing := ledger.missing(run.num_rows):
                with Sink(run.data_uri, ledger, lease, rows_per_file=config.rows_per_file, kept=kept) as sink:
                    for results in _stream(config, run, missing, make_engine):
                        new = sink.add(results)
                        _report(new, progress)
                        reasons.add(new)
    finally:
        reasons.log()
    written = Ledger.read(run.data_uri)  # what is there, not what we think that we put there
    if missing := written.missing(run.num_rows):
        raise RowsLost(f"{count(missing)} of {run.num_rows} rows are missing after {MAX_PASSES} passes: {missing[:5]}")


def _stream(config: RunConfig, run: Run, missing: Ranges, make_engine: EngineFactory) -> Iterator[pa.Table]:
    """Tables of `schema.result` as replicas finish them, in no particular order."""
    import ray

    model = OvisConfig.from_directory(fetch_checkpoint(config.model, config.revision, weights=False))
    hardware, encoders, pools = _plan(config, model)
    run.settle_dtype(settled_dtype(config, pools))
    configure_ray_data()
    encoder = None
    try:
        encoder = start_encoders(config, run.record["model"].get("frame encoder revision"), encoders)
        most_tile_bytes, tasks_per_row = _most_tile_bytes(config, model), len(config.asked)
        sizes = plan_batches(count(missing), pools, most_tile_bytes=most_tile_bytes, tasks_per_row=tasks_per_row)
        units = list(split(missing, sizes.rows_per_unit))
        # No task reads anything: a unit is two numbers, so no read can be starved of CPUs by the pools.
        dataset = ray.data.from_items([u._asdict() for u in units], override_num_blocks=min(len(units), MAX_BLOCKS))
        stages = _stages(config, run, pools, sizes, encoder, make_engine, prefer_nodes_without(hardware.gpu_types))
        for stage, options in stages:
            dataset = dataset.map_batches(stage, **options)
        with asked_for_gpus(pools):
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield table.cast(schema.result(config.columns))
    except ray.exceptions.RayError as error:
        if fault := cause_of(error, StoreFault):
            raise fault from error
        raise StageFailed(last_line(error)) from error
    finally:
        if encoder is not None:
            encoder.stop()


def _stages(
    config: RunConfig,
    run: Run,
    pools: Pools,
    sizes: Sizes,
    encoder: Encoder | None,
    make_engine: EngineFactory,
    where: dict[str, Any],
) -> list[tuple[type, dict[str, Any]]]:
    """Preprocess and Generate, with their pools of actors as options of `map_batches`."""
    from ray.data import ActorPoolStrategy

    revision = run.record["model"]["revision"]
    attempts = RemoteAttempts(start_attempt_counts())
    replica = Replica(pools.device, pools.threads_per_replica, pools.tensor_parallel)
    prepare = {
        "fn_constructor_args": (config, run.output, revision, attempts, encoder),
        "batch_size": 1,
        "num_cpus": pools.preprocessor_cpus,
        "compute": ActorPoolStrategy(size=pools.num_preprocessors),
        **where,
    }
    generate = {
        "fn_constructor_args": (config, revision, replica, make_engine, attempts),
        "batch_size": sizes.rows_per_batch,
        "num_cpus": pools.replica_cpus,
        "num_gpus": pools.replica_gpus,
        "compute": ActorPoolStrategy(
            min_size=pools.num_replicas,
            max_size=None if pools.may_grow else pools.num_replicas,
            max_concurrent_calls_per_actor=sizes.calls_per_replica,
            enable_true_multi_threading=True,
            max_tasks_in_flight_per_actor=sizes.calls_per_replica + 1,
        ),
    }
    return [(Preprocess, prepare), (Generate, generate)]


def _plan(config: RunConfig, model: OvisConfig) -> tuple[Hardware, EncoderPool, Pools]:
    hardware = Hardware.of_cluster()
    tensor_parallel = plan_tensor_parallel(config, hardware, model)
    encoders = plan_encoders(config, cpus=hardware.cpus, gpus=sum(hardware.gpus))
    left = hardware.without(cpus=encoders.cpus, gpus=encoders.gpus, gpus_per_replica=tensor_parallel)
    if encoders.gpus and left.room_for(tensor_parallel) < (1 if config.num_replicas == "auto" else config.num_replicas):
        encoders = plan_encoders(config, cpus=hardware.cpus, gpus=0)  # a replica needs the GPU more
        left = hardware.without(cpus=encoders.cpus, gpus=0, gpus_per_replica=tensor_parallel)
    pools = plan_pools(config, left, tensor_parallel)
    print(f"plan: {pools}{encoders}", file=sys.stderr)
    return hardware, encoders, pools


def _most_tile_bytes(config: RunConfig, model: OvisConfig) -> int:
    cells = config.tiles_for_frames
    # Of an image, and of a video's frames; what is cut has an overview too.
    tiles = max(config.tiles_for(1) + 1, config.num_frames * (cells + (cells > 1)))
    return tiles * 3 * model.vision.image_size**2


def _report(results: pa.Table, progress: RunProgress) -> None:
    errors = pc.sum(pc.equal(results.column("status"), "error")).as_py() or 0
    tokens = pc.sum(results.column("num_output_tokens")).as_py() or 0
    progress.add(rows=len(results), errors=errors, tokens=tokens)


def _summary(run: Run, ledger: Ledger, progress: RunProgress, seconds: float) -> Summary:
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
