"""Train a model: freeze and check the rows, let the workers take steps, keep checkpoints, write the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovis_model.checkpoint import describe_checkpoint, fetch_checkpoint, resolve_local_path
from ovis_model.tokenizer import load_tokenizer
from ovis_model.training.examples import PreferenceExample, render_example
from ovis_model.weight_files import check_weight_files
from ovis_model.wording import count_nouns
from pipelines.cluster.ray_session import open_ray_session, translate_ray_errors
from pipelines.cluster.resources import Hardware
from pipelines.config import ImageOptions
from pipelines.errors import ProcessesDie, RunError, SourceError, WorkersDied
from pipelines.monitoring.progress import Progress
from pipelines.output.lease import Lease
from pipelines.output.run_record import acquire_lease, note_unchanged
from pipelines.storage import store
from pipelines.storage.preflight import check_stores
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.config import TrainConfig
from pipelines.training.data.check import CheckedRows, PrepareOptions, check_rows, read_checked_rows
from pipelines.training.data.data_sets import list_short_names, list_training_rows
from pipelines.training.data.loader import Loader, RowSource
from pipelines.training.data.order import RowOrder, Rows, shuffle
from pipelines.training.data.row_table import write_rows
from pipelines.training.group import WorkerGroup
from pipelines.training.plan import TrainingPlan, check_memory, describe_memory, plan_training
from pipelines.training.record import TrainingRun, begin_run, read_run, remove_run
from pipelines.training.telemetry import Telemetry
from pipelines.training.worker import WorkerSettings

RESUME = "Checkpoints are kept; the same command without --overwrite continues from the last one"
_MAX_PREVIEW_CHARACTERS = 2000
_REFERENCE_ROWS = 256  # per worker and call, so that progress is seen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingReport:
    """What a run did; the rate is of this command only. `eval_loss` is None without held-out rows."""

    steps: int
    rows: int
    error_rows: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    tokens_per_s: float
    model: str


def run_training(config: TrainConfig) -> TrainingReport:
    """Train until the last step, or continue a run that was interrupted, and write OUTPUT/model.

    Raise ValueError for mistakes of usage; StageFailed, StoreFault, LeaseLost or ProcessesDie if the run stops.
    """
    started_s = time.monotonic()
    config = config.model_copy(update={"model": resolve_local_path(config.model)})
    with note_unchanged():
        check_stores((*config.input, *config.eval_input, config.output, config.model))
        store.allow_private_addresses(config.allow_private_addresses)
        if config.initialize != "all":
            check_weight_files(config.model, config.revision)
        model = describe_checkpoint(config.model, config.revision)
    try:
        with acquire_lease(config.output) as lease, ExitStack() as session:
            run = None if config.overwrite else read_run(config, model)
            if run is not None and run.is_finished:
                return _report(run, None, started_s)
            session.enter_context(open_ray_session())
            plan = plan_training(config, Hardware.detect())
            logger.warning("%s", plan)
            check_memory(config, plan, num_tokens=1, num_tiles=1)  # before the rows are read
            if run is None:
                remove_run(store.make_absolute(config.output))
                run = _freeze_rows(config, model, plan)
            return _report(run, _train(config, run, plan, lease), started_s)
    except BaseException as error:
        if not isinstance(error, ValueError):
            error.add_note(RESUME)
        raise


def _freeze_rows(config: TrainConfig, model: dict[str, Any], plan: TrainingPlan) -> TrainingRun:
    """List and check all rows, then write the run's record. Raise SourceError if too many are errors."""
    output = store.make_absolute(config.output)
    data_sets, eval_sets = config.read_data_sets(), config.read_eval_sets()
    num_rows = write_rows(output, list_training_rows([*data_sets, *eval_sets]))
    if not num_rows:
        raise SourceError(f"{', '.join(map(store.redact, config.input))} holds no row")
    checked = check_rows(output, num_rows, make_prepare_options(config), plan.num_cpus)
    if checked.num_errors:
        left_out = count_nouns(checked.num_errors, "row is", "rows are")
        logger.warning("of %d, %s left out: %s", num_rows, left_out, checked.describe_errors())
    if checked.num_errors > config.max_error_rate * num_rows:
        raise SourceError(
            f"{count_nouns(checked.num_errors, 'row is an error', 'rows are errors')} of {num_rows} "
            f"({checked.describe_errors(3)}); see "
            f"{store.join(config.output, 'errors.jsonl')}, correct the data or raise --max-error-rate"
        )
    num_good = int(checked.is_of_first(len(data_sets)).sum())
    if num_good <= config.eval_rows:
        raise RunError(f"--eval-rows {config.eval_rows} leaves no row to train on; {num_good} can be used")
    weights = [data_set.weight for data_set in data_sets]
    names = list_short_names([*data_sets, *eval_sets])
    return begin_run(config, model, num_rows=num_rows, weights=weights, data_sets=names, threads=plan.threads)


def make_prepare_options(config: TrainConfig) -> PrepareOptions:
    """Return what decides the examples of rows."""
    images = ImageOptions(**config.model_dump(include=set(ImageOptions.model_fields)))
    return PrepareOptions(
        model=config.model,
        revision=config.revision,
        images=images,
        max_length=config.max_length,
        is_preference=config.is_preference,
        allow_private_addresses=config.allow_private_addresses,
    )


def _train(config: TrainConfig, run: TrainingRun, plan: TrainingPlan, lease: Lease) -> Telemetry:
    """Take all missing steps; dead workers start again from the last checkpoint."""
    checked = read_checked_rows(run.output)
    size = config.per_device_train_batch_size
    memory = check_memory(config, plan, *checked.measure_largest(size, answers=1 + config.is_preference))
    logger.warning("%s", describe_memory(memory, plan))
    settings = make_settings(config, run, plan, checked)
    logger.warning("the first row, with what is learnt in [[ ]]:\n%s", preview_row(settings))
    deaths, reached = 0, -1
    while True:
        step = settings.checkpoints.find_last() or 0
        settings.checkpoints.remove_after(step)
        deaths, reached = (deaths, reached) if step == reached else (0, step)
        try:
            with translate_ray_errors(), WorkerGroup(settings, plan.cpus_per_worker) as group:
                group.start(step or None)
                return _take_steps(config, run, settings, group, lease, step)
        except WorkersDied as death:
            deaths += 1
            if deaths > config.max_restarts:
                times = count_nouns(deaths, "time")
                raise ProcessesDie(f"workers died {times} without a new checkpoint, the last time: {death}") from death
            logger.warning("a worker died (%s); all start again from the last checkpoint", death)


def preview_row(settings: WorkerSettings) -> str:
    """Return the text of the first row as the model sees it, at most _MAX_PREVIEW_CHARACTERS of it."""
    [example] = Loader(settings.source).load(settings.order.numbers[:1].tolist())
    shown = example.split()[0] if isinstance(example, PreferenceExample) else example
    directory = fetch_checkpoint(settings.config.model, settings.config.revision, weights=False)
    return render_example(shown, load_tokenizer(directory))[:_MAX_PREVIEW_CHARACTERS]


def make_settings(config: TrainConfig, run: TrainingRun, plan: TrainingPlan, checked: CheckedRows) -> WorkerSettings:
    """Return what all workers share: the order of rows, those held out, and the number of steps."""
    weights = run.record["weights"]
    is_trained = checked.is_of_first(len(weights))
    good, only_held_out = checked.good[is_trained], checked.good[~is_trained]
    drawn = good[shuffle(len(good), config.seed, 0, "held out")[: config.eval_rows]]
    held_out, trained = np.sort(np.concatenate([drawn, only_held_out])), np.setdiff1d(good, drawn)
    order = RowOrder(
        numbers=trained,
        lengths=checked.get_lengths()[trained],
        data_sets=checked.get_data_sets()[trained],
        weights=tuple(weights),
        batch_size=config.batch_size,
        seed=config.seed,
    )
    shown = held_out if len(held_out) else trained
    return WorkerSettings(
        config=config,
        source=RowSource(run.output, run.num_rows, make_prepare_options(config)),
        order=order,
        held_out=_group_rows(held_out, checked.get_data_sets()[held_out], run.record["data_sets"]),
        shown=tuple(shown[: config.num_samples].tolist()),
        num_steps=config.max_steps or config.num_train_epochs * order.steps_per_epoch,
        device=plan.device,
        precision=plan.precision,
        threads=run.record["threads"],
        checkpoints=Checkpoints(run.state_uri),
    )


def _group_rows(rows: Rows, data_sets: Rows, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return {name of a data set: its rows}, of those that have some."""
    return {names[n]: tuple(rows[data_sets == n].tolist()) for n in np.unique(data_sets).tolist()}


def _take_steps(
    config: TrainConfig, run: TrainingRun, settings: WorkerSettings, group: WorkerGroup, lease: Lease, first: int
) -> Telemetry:
    """Take the steps from `first`, with measurements and checkpoints between them, and write the model."""
    if config.is_preference:
        group.call("set_reference", _get_reference(run, settings, group))
    telemetry = Telemetry(config, run, settings, first)
    with Progress("steps", settings.num_steps, first) as progress:
        for start, stop in list_spans(config, first, settings.num_steps):
            began_s = time.monotonic()
            telemetry.add_steps(stop, group.call("train", stop)[0], time.monotonic() - began_s)
            _measure(config, settings, group, telemetry, stop)
            if _is_due(stop, config.save_steps, settings.num_steps):
                lease.check()
                telemetry.write()  # first: a checkpoint promises the metrics up to its step
                group.call("save", stop, {"step": stop, "position": settings.order.locate(stop)})
            progress.advance(stop - start)
    lease.check()
    _export(run, group, telemetry)
    return telemetry


def list_spans(config: TrainConfig, first: int, num_steps: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the steps between two events: a line of metrics, a measurement or a checkpoint."""
    every = [config.logging_steps, config.save_steps, config.eval_steps, config.sample_steps or num_steps]
    while first < num_steps:
        stop = min(num_steps, *((first // steps + 1) * steps for steps in every))
        yield first, stop
        first = stop


def _is_due(step: int, every: int | None, num_steps: int) -> bool:
    return step == num_steps or (every is not None and step % every == 0)


def _measure(
    config: TrainConfig, settings: WorkerSettings, group: WorkerGroup, telemetry: Telemetry, step: int
) -> None:
    if settings.held_out and _is_due(step, config.eval_steps, settings.num_steps):
        telemetry.add(step, "eval", group.call("evaluate")[0])
    if settings.shown and _is_due(step, config.sample_steps, settings.num_steps):
        for sample in group.call("answer")[0]:
            telemetry.add(step, "sample", sample)


def _get_reference(run: TrainingRun, settings: WorkerSettings, group: WorkerGroup) -> Any:
    """Return the reference's log-probabilities of all rows; they are computed once, before the first step."""
    uri = store.join(run.output, "reference.parquet")
    reference = np.zeros((run.num_rows, 2), np.float32)
    if store.find_file(uri) is None:
        _write_reference(uri, settings, group)
    table = store.read_parquet(uri)
    reference[table.column("row").to_numpy()] = np.stack(
        [table.column(name).to_numpy() for name in ("chosen", "rejected")], axis=1
    )
    return reference


def _write_reference(uri: str, settings: WorkerSettings, group: WorkerGroup) -> None:
    rows = [*settings.order.numbers.tolist(), *chain.from_iterable(settings.held_out.values())]
    found = []
    per_call = _REFERENCE_ROWS * settings.config.num_workers
    with Progress("pairs measured", len(rows)) as progress:
        for at in range(0, len(rows), per_call):
            for part in group.call("measure_reference", rows[at : at + per_call]):
                found += part
            progress.advance(len(rows[at : at + per_call]))
    columns = zip(*sorted(found), strict=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(zip(("row", "chosen", "rejected"), map(list, columns), strict=True))), sink)
    store.write_bytes(uri, sink.getvalue().to_pybytes())


def _export(run: TrainingRun, group: WorkerGroup, telemetry: Telemetry) -> None:
    """Write OUTPUT/model and OUTPUT/adapter, and mark the run as finished."""
    telemetry.write()
    facts = telemetry.describe()
    group.call("export", run.model_uri, store.join(run.output, "adapter"), facts)
    run.update(status="finished", metrics=facts)


def _report(run: TrainingRun, telemetry: Telemetry | None, started_s: float) -> TrainingReport:
    checked = read_checked_rows(run.output)
    facts = run.record["metrics"]
    return TrainingReport(
        steps=facts["steps"],
        rows=run.num_rows,
        error_rows=checked.num_errors,
        loss=facts["loss"],
        eval_loss=facts["eval_loss"],
        seconds=round(time.monotonic() - started_s, 3),
        tokens_per_s=round(telemetry.tokens_per_s, 1) if telemetry else 0.0,
        model=run.model_uri,
    )
