"""`ovis2 plan` says what a run would do, without changing anything, and the run that follows does so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import plan
from jobs.gpu_estimates import GpuEstimator
from ovis_model.config import SIZES
from ovis_model.engine.forecast import GPUS, choose_ranks, estimate_rate, plan_gpu_memory
from pipelines.cluster.attempts import DIED
from pipelines.config import CaptionConfig
from pipelines.errors import RunError
from pipelines.forecast import sample, trial
from pipelines.forecast.contents import PartOfListing, describe_contents, spread
from pipelines.forecast.forecast import Forecast, ForecastOptions, make_forecast
from pipelines.output.run_record import open_run
from pipelines.pipeline import run_pipeline
from pipelines.sources import list_rows
from tests.support.fake_engine import FakeEngineFactory
from tests.support.golden_data import checkpoint_dir
from tests.support.jsonl_files import write_lines
from tests.support.pictures import draw, write_demo_pictures
from tests.support.processes import against_the_clock, run_job

MODEL = str(checkpoint_dir("tiny56-tied"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    for i in range(60):
        draw(directory / f"{i:02}.png", seed=i, width=60 + i, height=60)
    (directory / "broken.jpg").write_bytes(b"no image")
    return directory


def make_config(inputs: Path, output: Path, **options: Any) -> CaptionConfig:
    return CaptionConfig(input=(str(inputs),), output=str(output), **{"model": MODEL, "max_new_tokens": 4, **options})


def forecast(config: CaptionConfig, engine: FakeEngineFactory, **options: Any) -> Forecast:
    return make_forecast(config, ForecastOptions(**options), GpuEstimator(None, 1, 100), make_engine=engine)


def test_contents_count_kinds_sizes_and_duplicates(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", seed=1)
    lines = [{"id": "1", "image": "a.png"}, {"id": "1", "image": "a.png"}, {"id": "2", "prompt": "Hello"}, {"id": "3"}]
    inputs = write_lines(tmp_path / "in.jsonl", *lines)
    config = make_config(inputs, tmp_path / "out", id_column="id", prompt_column="prompt", on_duplicate_id="skip")
    with list_rows(config, config.questionnaire) as listing:
        found = describe_contents(listing)
    assert (found["rows"], found["duplicate_ids"]) == (3, 1)
    counts = {kind: values["rows"] for kind, values in found["kinds"].items()}
    assert counts == {"files": 1, "text without image": 1, "unreadable when listed": 1}


def test_a_part_of_a_listing_has_its_rows_in_order(pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures, tmp_path / "out")
    with list_rows(config, config.questionnaire) as listing:
        whole = [id_ for table in listing.read_tables() for id_ in table.column("id").to_pylist()]
        rows = spread(len(whole), 7)
        part = PartOfListing(listing, rows)
        assert [id_ for t in part.read_tables() for id_ in t.column("id").to_pylist()] == [whole[i] for i in rows]
    assert spread(3, 200).tolist() == [0, 1, 2] and spread(1000, 2).tolist() == [0, 999] and len(spread(0, 5)) == 0


@pytest.mark.parametrize(
    ("size", "gpu", "ranks"), [("8B", "h100-80", 1), ("34B", "h100-80", 2), ("34B", "h200-141", 1)]
)
def test_memory_plans_of_published_sizes(size: str, gpu: str, ranks: int) -> None:
    assert choose_ranks(SIZES[size], GPUS[gpu], "none") == ranks
    memory = plan_gpu_memory(SIZES[size], GPUS[gpu], ranks, "none")
    assert memory.weight_gb < 0.9 * GPUS[gpu].memory_gb and memory.cache_tokens > 16 * 2600
    assert plan_gpu_memory(SIZES[size], GPUS[gpu], ranks, "fp8").cache_tokens >= memory.cache_tokens


def test_estimates_grow_with_the_gpu_and_shrink_with_the_work() -> None:
    def estimate(gpu: str, output: float) -> float:
        memory = plan_gpu_memory(SIZES["8B"], GPUS[gpu], 1, "none")
        return estimate_rate(SIZES["8B"], GPUS[gpu], memory, tiles=10, prompt=2600, output=output).rows_per_s

    assert estimate("h100-80", 100) > 2 * estimate("a100-80", 100) > 4 * estimate("l40s-48", 1000) > 0
    assert 1 < estimate("h100-80", 100) < 100


def test_a_plan_from_figures_says_that_it_is_an_estimate(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(pictures), str(tmp_path / "out"), "--model", MODEL, "--gpu", "a100-80", "--num-gpus", "4"]
    assert plan.main([*argv, "--price-per-gpu-hour", "2"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert "an estimate, not measured, from 35 % of 312 TFLOPS" in printed.err and "TFLOPS" in found["estimated_from"]
    assert (found["rows"], found["sample"]["unreadable"]) == (61, 1) and found["cost"] >= 0
    assert list(found["sample"]["reasons"].values()) == [1]
    assert found["memory"]["ranks"] == 1 and found["report"] is None
    assert plan.main([*argv, "--quantization", "fp8"]) == 0
    [reason] = json.loads(capsys.readouterr().out.splitlines()[-1])["refused"]
    assert "needs GPUs of compute capability 8.9" in reason
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.parametrize(("seconds_per_row", "limit"), [(0.05, "engine")])
def test_a_trial_measures_the_rate_and_the_limit(
    ray_cluster: None,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds_per_row: float,
    limit: str,
) -> None:
    monkeypatch.setattr(trial, "TRIAL_S", 60)
    (tmp_path / "out").mkdir()
    to = tmp_path / "plan.html"
    found = forecast(
        make_config(pictures, tmp_path / "out", max_error_rate=0.001),
        FakeEngineFactory(seconds_per_row=seconds_per_row),
        to=str(to),
    )
    assert found.limited_by == limit and found.limit and found.estimated_from is None
    assert found.rows_per_s == pytest.approx(1 / seconds_per_row, rel=0.3)
    assert found.eta_s and found.output_bytes and found.memory["sequences"] > 0
    assert [reason[:42] for reason in found.refused] == ["the run would exit with code 3: 2% of the "]
    assert to.stat().st_size > 10_000
    assert sorted(os.listdir(tmp_path)) == ["out", "plan.html"] and os.listdir(tmp_path / "out") == []  # noqa: PTH208


@against_the_clock
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small pictures", "large pictures", "slow engine"])
def test_the_run_that_follows_takes_as_long_as_planned(tmp_path: Path, kind: str) -> None:
    """Whole commands, each with its own Ray. The figures of docs/operate.md."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    options: list[object] = ["--model", "demo"]
    if kind == "small pictures":
        write_demo_pictures(inputs, 1500)
    elif kind == "large pictures":
        draw(inputs / "0.jpg", seed=1, width=4000, height=3000)
        for i in range(1, 600):
            (inputs / f"{i}.jpg").hardlink_to(inputs / "0.jpg")
        options += ["--max-new-tokens", 4, "--max-tiles", 1]
    else:
        write_demo_pictures(inputs, 600)
        options += ["--prompt", "Describe the image in detail. " * 40]
    planned = run_job("plan", inputs, tmp_path / "out", *options, "--sample-report", tmp_path / "plan.html")
    assert planned.exit_code == 0, planned.stderr
    run = run_job("caption", inputs, tmp_path / "out", *options)
    assert run.exit_code == 0, run.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    eta_s, seconds = planned.summary["eta_s"], run.summary["seconds"]
    print(
        f"{kind}: planned {eta_s:.1f} s, took {seconds:.1f} s; {planned.summary['limit']}; {planned.summary['stages']}"
    )
    assert eta_s == pytest.approx(seconds, rel=0.25)
    assert planned.summary["limited_by"] == record["sessions"][0]["limited_by"]


def test_a_plan_of_a_run_that_cannot_resume_is_refused(pictures: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Rows that OUTPUT has are not counted again; other options are refused."""
    run_pipeline(make_config(pictures, tmp_path / "out"), make_engine=FakeEngineFactory())
    config = make_config(pictures, tmp_path / "out")
    options = ForecastOptions(gpu="h100-80")
    found = make_forecast(config, options, GpuEstimator("h100-80", 1, 10))
    assert (found.rows, found.rows_to_do, found.refused) == (61, 0, [])
    other = make_forecast(config.model_copy(update={"seed": 7}), options, GpuEstimator("h100-80", 1, 10))
    assert len(other.refused) == 1 and "seed" in other.refused[0]
    assert np.isfinite(other.eta_s or 0.0)


def test_the_plan_of_a_shard_is_about_its_rows(pictures: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Before there is a list, and afterwards from the list, when the part has rows already."""
    config = make_config(pictures, tmp_path / "out", shard="2/3")
    options, estimator = ForecastOptions(gpu="h100-80"), GpuEstimator("h100-80", 1, 10)
    planned = make_forecast(config, options, estimator)
    assert (planned.rows, planned.rows_to_do) == (20, 20) and list(tmp_path.iterdir()) == []
    run_pipeline(config, make_engine=FakeEngineFactory())
    found = make_forecast(config, options, estimator)
    assert (found.rows, found.rows_to_do, found.refused) == (20, 0, [])
    assert found.contents["kinds"] == planned.contents["kinds"]
    last = make_forecast(config.model_copy(update={"shard": "3/3"}), options, estimator)
    assert (last.rows, last.rows_to_do) == (21, 21)
    with pytest.raises(RunError, match="give --shard I/3"):
        make_forecast(config.model_copy(update={"shard": "1/2"}), options, estimator)


def test_a_crash_of_a_decoder_is_a_row_that_cannot_be_read(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is prepared in a child process, which is started again."""
    monkeypatch.setattr(sample, "MAX_SAMPLE_S", 600)
    config = make_config(pictures, tmp_path / "out")
    run = open_run(config, {"id": MODEL, "revision": None})
    found = sample.prepare_sample(config, run.output, None, run.num_rows, module="tests.support.crashing_decoder")
    assert len(found.rows) == 61 and found.describe()["unreadable"] == 3
    assert [row.error for row in found.rows].count(DIED) == 2
    assert len(found.cpu_s) == 58 and 0 < found.mean_cpu_s < 1
