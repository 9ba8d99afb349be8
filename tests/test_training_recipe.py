"""A recipe runs its stages in order; options of training are checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.train import main
from pipelines.cluster.resources import Hardware
from pipelines.errors import ResourceError, RunError
from pipelines.training.config import TrainConfig
from pipelines.training.plan import TrainingPlan, check_memory, plan_training
from pipelines.training.recipe import RecipeOptions, read_recipe
from pipelines.training.record import begin_run, read_run
from tests.support.training_files import TINY, write_data


def make_config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"input": "data.json", "output": "out", "model": "demo", **options})


def write_recipe(tmp_path: Path, text: str) -> RecipeOptions:
    (tmp_path / "recipe.yaml").write_text(text)
    return RecipeOptions(recipe=str(tmp_path / "recipe.yaml"), output=str(tmp_path / "made"))


def test_each_stage_begins_with_the_model_of_the_one_before(tmp_path: Path) -> None:
    text = (
        "model: start\nseed: 7\nstages: [{stage: 1, input: a.json}, {stage: dpo, name: align, input: b.json, seed: 8}]"
    )
    configs = read_recipe(write_recipe(tmp_path, text))
    assert list(configs) == ["1-1", "2-align"]
    first, second = configs.values()
    assert (first.model, first.seed, first.parts.count("|")) == ("start", 7, 2)
    assert (second.model, second.seed, second.is_preference) == (f"{tmp_path}/made/1-1/model", 8, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: m\nstages: []", "must hold `stages`"),
        ("model: m\nstages: [{stage: 9, input: a}]", "stage 1-9, stage: Input should be '1', '2', '3', '4' or 'dpo'"),
        ("model: m\nstages: [{stage: 4}]", "stage 1-4, input: Field required"),
        ("model: m\nstages: [{stage: 4, input: a, learning_rat: 1}]", "learning-rat: Extra inputs"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_stage_and_the_option(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml") as refused:
        read_recipe(write_recipe(tmp_path, text))
    assert reason in str(refused.value)


@pytest.mark.slow
def test_a_recipe_from_nothing_runs_to_its_last_model_and_is_not_repeated(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogues, pairs = write_data(tmp_path / "a"), write_data(tmp_path / "b", pairs=True)
    common = f"model: {TINY}\nmax-steps: 2\nmax-tiles: 2\ndevice: cpu\nper-device-train-batch-size: 4\n"
    stages = [
        f"{{stage: 4, name: from nothing, initialize: all, input: {dialogues}}}",
        f"{{stage: 2, input: {dialogues}}}",
        f"{{stage: dpo, input: {pairs}}}",
    ]
    options = write_recipe(tmp_path, f"{common}stages: [{', '.join(stages)}]")
    for _ in range(2):
        assert main(["--recipe", options.recipe, options.output]) == 0
        report = json.loads(capsys.readouterr().out)
        assert list(report["stages"]) == ["1-from nothing", "2-2", "3-dpo"]
        assert Path(report["model"], "model.safetensors").exists()


def test_learning_rates_are_those_of_the_stage_unless_given() -> None:
    assert [make_config(stage=stage).peak_learning_rate for stage in (1, "dpo")] == [1e-4, 1e-6]
    assert make_config(stage="dpo", lora_rank=8).peak_learning_rate == 2e-5
    assert make_config(learning_rates="vte=1e-3,llm=1e-5").part_learning_rates == {"vte": 1e-3, "llm": 1e-5}
    assert make_config(lora_rank=8).parts == "lora"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learning_rates": "vte"}, "must be PART=RATE"),
        ({"learning_rates": "vte=nan"}, "must be PART=RATE"),
        ({"lora_rank": 8, "stage": 1}, "which stage 1 does not"),
        ({"frame_selection": "top-k"}, "not supported in training"),
        ({"learning_rate": 0}, "greater than 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        make_config(**options)


def test_a_cluster_that_is_too_small_is_refused() -> None:
    with pytest.raises(ResourceError, match="--num-workers 4 needs as many GPUs; the cluster has 2"):
        plan_training(make_config(num_workers=4), Hardware(8, (2,)))
    plan = plan_training(make_config(num_workers=2), Hardware(8, (2,)))
    assert (plan.device, plan.precision, f"{plan}") == ("cuda", "bfloat16", "plan: 2 workers (each: 1 GPU), bfloat16")
    assert plan_training(make_config(num_workers=4), Hardware(2)).cpus_per_worker == 0.5


class SmallPlan(TrainingPlan):
    """A plan for a device of 1 MB."""

    device_bytes = 1_000_000


def test_a_model_that_does_not_fit_is_refused_with_the_shortfall() -> None:
    plan = SmallPlan("cuda", "bfloat16", 1, 1.0, 1, 4)
    with pytest.raises(ValueError, match=r"0\.0 of 0\.0 GB are usable: \d+\.\d GB too few"):
        check_memory(make_config(), plan, num_tokens=2600, num_tiles=10)


def test_a_run_of_a_version_that_lacked_an_option_has_its_default(tmp_path: Path) -> None:
    model = {"weights": "w"}
    run = begin_run(make_config(output=str(tmp_path)), model, num_rows=1)
    del run.record["identity"]["eval_input"], run.record["identity"]["beta"]
    run.update()
    assert read_run(make_config(output=str(tmp_path)), model) is not None
    with pytest.raises(RunError, match=r"beta 0\.1 there, 0\.2 here"):
        read_run(make_config(output=str(tmp_path), beta=0.2), model)
