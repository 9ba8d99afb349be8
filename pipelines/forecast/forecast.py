"""Forecast a run: list INPUT, prepare a sample, run some rows and reckon from them. OUTPUT stays unchanged."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ovis_model.wording import count_nouns
from pipelines.checks import check_model, describe_models, resolve_model_paths
from pipelines.cluster.ray_session import open_ray_session
from pipelines.cluster.resources import PREPROCESSORS_PER_GPU
from pipelines.config import RunConfig
from pipelines.errors import ResourceError, RunError
from pipelines.forecast.contents import PartOfListing, describe_contents, spread
from pipelines.forecast.sample import PreparedSample, prepare_sample
from pipelines.forecast.trial import MAX_ROWS, Trial, run_trial
from pipelines.generate import EngineFactory, load_engine
from pipelines.monitoring.limits import Limit, find_limit
from pipelines.output.lease import Lease
from pipelines.output.ledger import Ledger, count_rows
from pipelines.output.parts import ListedRows, cut_part, find_part
from pipelines.output.run_record import Run, acquire_lease, check_output, prepare_run
from pipelines.plan import plan_run
from pipelines.report.build import ReportOptions, write_report
from pipelines.sources import list_rows
from pipelines.sources.listing import RowListing
from pipelines.storage import store
from pipelines.storage.preflight import check_stores

Json = dict[str, Any]


class Estimator(Protocol):
    """What is known of the model's speed and memory without running it; knows torch, which this package does not."""

    def plan_memory(self, config: RunConfig) -> Json:
        """Return the memory plan of a replica. Raise ValueError if it does not fit."""
        ...

    def estimate(self, config: RunConfig, *, tiles: float, prompt: float) -> Json:
        """Return `rows_per_s` and `gpus` of all replicas, `pools` and `figures`. Raise ValueError."""
        ...


@dataclass(frozen=True)
class ForecastOptions:
    """What to forecast besides the run's own options.

    gpu: estimate for this GPU instead of running rows here. trial_rows: rows to run at least.
    to: file of the sample's report, None for none. price_per_gpu_hour: in any currency.
    """

    gpu: str | None = None
    trial_rows: int = 32
    price_per_gpu_hour: float | None = None
    to: str | None = None


@dataclass(frozen=True)
class Forecast:
    """What a run would do. Figures of a trial are measured here; `estimated_from` is set if they are computed.

    eta_s: of the whole command, listing and start-up included.
    """

    rows: int
    rows_to_do: int
    contents: Json
    sample: Json
    pools: str
    memory: Json
    refused: list[str]
    rows_per_s: float | None
    stages: Json
    limited_by: str | None
    limit: str | None
    eta_s: float | None
    gpu_hours: float | None
    cost: float | None
    output_bytes: int | None
    estimated_from: str | None
    report: str | None


@dataclass(frozen=True)
class _Rates:
    """Rates of the whole run and of its stages, in rows per second; None if nothing could be run."""

    rows_per_s: float | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    limit: Limit | None = None
    startup_s: float = 0.0
    gpus: int = 0
    bytes_per_row: float | None = None
    estimated_from: str | None = None
    pools: str = ""


def make_forecast(
    config: RunConfig, options: ForecastOptions, estimator: Estimator, *, make_engine: EngineFactory = load_engine
) -> Forecast:
    """Return what the run of `config` would do. Raise ValueError if INPUT or the model cannot be used."""
    check_stores((*config.input, config.output, config.model))
    config = resolve_model_paths(config)
    check_model(config)
    models = describe_models(config)
    started_s = time.monotonic()
    # A run that cuts videos lists more rows; how many is not known before the videos are read.
    listed = config.model_copy(update={"on_duplicate_id": "skip", "split": None, "window_s": None, "shard": None})
    with ExitStack() as closing:
        config, listing = _list_rows(config, listed, closing)
        listing_s = time.monotonic() - started_s
        refused, ledger = _find_refusals(config, models, listing)
        num_rows = max(0, listing.num_rows - count_rows(ledger.done))
        with _open_trial(listed, models, listing) as (trial_config, run, lease):
            sample = prepare_sample(trial_config, run.output, models["revision"], run.num_rows)
            refused += _find_sample_refusals(config, sample)
            if options.gpu:
                rates, report = _estimate(config, sample, estimator, refused), None
            else:
                rates, report = _measure(trial_config, run, lease, options, num_rows, make_engine, refused)
            memory = _plan_memory(config, estimator, refused)
        contents = describe_contents(listing)
    if config.cuts_videos and not isinstance(listing, ListedRows):
        contents["note"] = "videos are counted whole: cuts are found when the run begins"
    return _assemble(contents, num_rows, sample, refused, rates, memory, options, listing_s, report)


def _list_rows(config: RunConfig, listed: RunConfig, closing: ExitStack) -> tuple[RunConfig, RowListing]:
    """Return the configuration of the OUTPUT that the run would write, and its rows; with --shard those of a part."""
    if config.shard is not None and (found := find_part(config)) is not None:
        part, rows = found
        return config.model_copy(update={"output": part.output}), rows
    whole = closing.enter_context(list_rows(listed, listed.questionnaire, output=store.make_absolute(config.output)))
    if config.shard is None:
        return config, whole
    part = cut_part(config, whole.num_rows)
    numbers = np.concatenate([np.arange(start, stop) for start, stop in part.pieces])
    return config.model_copy(update={"output": part.output}), PartOfListing(whole, numbers)


def _find_refusals(config: RunConfig, models: dict[str, str | None], listing: RowListing) -> tuple[list[str], Ledger]:
    """Return why the run would be refused, and the rows that OUTPUT has already."""
    refused = []
    if listing.num_skipped and config.on_duplicate_id == "error":
        ids = count_nouns(listing.num_skipped, "row")
        refused.append(f"{ids} repeat an id; give --on-duplicate-id suffix or skip, or another --id-column")
    try:
        return refused, check_output(config, models)
    except (RunError, OSError) as error:
        return [*refused, str(error)], Ledger()


def _find_sample_refusals(config: RunConfig, sample: PreparedSample) -> list[str]:
    share = 1 - len(sample.ok) / max(1, len(sample.rows))
    if share > config.stop_error_rate:
        return [f"the run would stop: {share:.0%} of the sample are error rows, over --stop-error-rate"]
    if share > config.max_error_rate:
        return [f"the run would exit with code 3: {share:.0%} of the sample are error rows, over --max-error-rate"]
    return []


@contextmanager
def _open_trial(
    config: RunConfig, models: dict[str, str | None], listing: RowListing
) -> Iterator[tuple[RunConfig, Run, Lease]]:
    """Yield a run of rows spread over the listing, in a directory next to OUTPUT that is removed afterwards."""
    place = f"{store.make_absolute(config.output).rstrip('/')}-plan-{uuid.uuid4().hex[:8]}"
    changes: Json = {"output": place, "overwrite": False, "extend": False, "retry_errors": False}
    trial = config.model_copy(update=changes)

    def list_part(*_: object, **__: object) -> PartOfListing:
        return PartOfListing(listing, spread(listing.num_rows, MAX_ROWS))

    try:
        with acquire_lease(place) as lease:
            with prepare_run(trial, models, list_part) as prepared:
                run = prepared.start(lease)
            yield trial, run, lease
            store.remove_all(place)
    finally:
        store.remove_all(place)


def _measure(
    config: RunConfig,
    run: Run,
    lease: Lease,
    options: ForecastOptions,
    num_rows: int,
    make_engine: EngineFactory,
    refused: list[str],
) -> tuple[_Rates, str | None]:
    """Run some rows on the present hardware, unless it is too small for the run."""
    started_s = time.monotonic()
    with open_ray_session():
        try:
            plan = plan_run(config, max(1, num_rows))
        except ResourceError as error:
            refused.append(str(error))
            return _Rates(), None
        run.update(settled_dtype=plan.dtype)
        trial = run_trial(
            config, run, plan, lease, make_engine, started_s=started_s, min_rows=min(options.trial_rows, run.num_rows)
        )
    run.update(status="stopped")
    report = write_report(ReportOptions(output=run.output, to=options.to, rows=options.trial_rows)).report
    gpus = plan.pools.num_replicas * plan.pools.replica_gpus + plan.encoders.gpus
    rates = _Rates(
        rows_per_s=trial.rows_per_s,
        stages=_describe_stages(trial),
        limit=find_limit(trial.use),
        startup_s=trial.startup_s,
        gpus=gpus,
        bytes_per_row=trial.bytes_per_row,
        pools=f"{plan.pools}{plan.encoders}",
    )
    return rates, report


def _describe_stages(trial: Trial) -> dict[str, float]:
    """Return the rows per second that each stage would do if it never waited for another."""
    use = {"preprocessors": trial.use.preprocessor, "replicas": trial.use.replica}
    return {stage: found.rows_per_s / found.busy for stage, found in use.items() if found.busy > 0}


def _estimate(config: RunConfig, sample: PreparedSample, estimator: Estimator, refused: list[str]) -> _Rates:
    """Reckon from the GPU's figures, and from the CPU time of the sample on this machine."""
    ok = sample.ok or sample.rows
    tiles, prompt = (sum(getattr(row, name) for row in ok) / len(ok) for name in ("num_tiles", "num_prompt_tokens"))
    try:
        engine = estimator.estimate(config, tiles=tiles, prompt=prompt)
    except ValueError as error:
        refused.append(str(error))
        return _Rates()
    cpus = config.num_preprocessors if config.num_preprocessors != "auto" else PREPROCESSORS_PER_GPU * engine["gpus"]
    stages = {"preprocessors": cpus / max(sample.mean_cpu_s, 1e-6), "replicas": engine["rows_per_s"]}
    is_slow = stages["preprocessors"] < stages["replicas"]
    limit = Limit("prepare", "CPUs that prepare") if is_slow else Limit("engine", "the engine")
    figures = f"{engine['figures']}; {cpus} preprocessors at the {1000 * sample.mean_cpu_s:.0f} ms a row of this CPU"
    return _Rates(
        min(stages.values()), stages, limit, gpus=engine["gpus"], estimated_from=figures, pools=engine["pools"]
    )


def _plan_memory(config: RunConfig, estimator: Estimator, refused: list[str]) -> Json:
    try:
        return estimator.plan_memory(config)
    except ValueError as error:
        refused.append(str(error))
        return {}


def _assemble(
    contents: Json,
    num_rows: int,
    sample: PreparedSample,
    refused: list[str],
    rates: _Rates,
    memory: Json,
    options: ForecastOptions,
    listing_s: float,
    report: str | None,
) -> Forecast:
    eta_s = listing_s + rates.startup_s + num_rows / rates.rows_per_s if rates.rows_per_s else None
    gpu_hours = None if eta_s is None else rates.gpus * eta_s / 3600
    price = options.price_per_gpu_hour
    return Forecast(
        rows=contents["rows"],
        rows_to_do=num_rows,
        contents=contents,
        sample=sample.describe(),
        pools=rates.pools,
        memory=memory,
        refused=list(dict.fromkeys(refused)),
        rows_per_s=_round(rates.rows_per_s),
        stages={name: _round(rate) for name, rate in rates.stages.items()},
        limited_by=rates.limit.name if rates.limit else None,
        limit=rates.limit.line if rates.limit else None,
        eta_s=_round(eta_s),
        gpu_hours=_round(gpu_hours),
        cost=None if price is None or gpu_hours is None else _round(price * gpu_hours),
        output_bytes=None if rates.bytes_per_row is None else round(rates.bytes_per_row * num_rows),
        estimated_from=rates.estimated_from,
        report=report,
    )


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
