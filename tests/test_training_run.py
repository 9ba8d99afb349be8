"""Training gives the same weights however its rows are shared, and whatever dies; its model is used at once."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

from jobs import caption
from jobs.train import main as run_command
from pipelines.errors import ProcessesDie
from pipelines.output.sink import read_results
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.config import TrainConfig
from pipelines.training.group import WorkerGroup
from pipelines.training.run import TrainingReport, list_spans, run_training
from tests.support.processes import Job, wait_for
from tests.support.training_files import TINY, make_train_config, write_data

NUM_STEPS = 20
RUN = {
    "max_steps": NUM_STEPS,
    "learning_rate": 1e-4,
    "save_steps": 4,
    "logging_steps": 1,
    "eval_rows": 2,
    "eval_steps": 10,
    "num_samples": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 12)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """Train with one worker to the end; return OUTPUT."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    train(data, output, per_device_train_batch_size=8)
    return output


def train(data: Path | str, output: Path | str, **options: Any) -> TrainingReport:
    return run_training(make_train_config(data, output, **{**RUN, **options}))


def read_lines(output: Path) -> list[dict[str, Any]]:
    """Return the metrics without measured times."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def read_weights(output: Path) -> dict[str, Any]:
    checkpoints = Checkpoints(str(output / "training_state"))
    return dict(checkpoints.read_tensors(checkpoints.list_steps()[-1]))


def assert_bitwise_equal(output: Path, other: Path) -> None:
    found, wanted = read_weights(output), read_weights(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()] == []
    assert read_lines(output) == read_lines(other)
    model = "model/model.safetensors"
    assert (output / model).read_bytes() == (other / model).read_bytes()


SHARES = {
    "two workers": {"per_device_train_batch_size": 4, "num_workers": 2},
    "divided": {"per_device_train_batch_size": 4, "num_workers": 2, "fsdp": True},
}


@pytest.mark.parametrize("share", ["two workers", pytest.param("divided", marks=pytest.mark.slow)])
def test_rows_shared_in_another_way_give_the_same_steps(
    share: str, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    train(data, tmp_path / "out", **SHARES[share])
    assert_equal_steps(tmp_path / "out", undisturbed)


def assert_equal_steps(output: Path, other: Path) -> None:
    """Check that two runs have the same losses, gradients and weights but for rounding."""
    for found, wanted in zip(read_lines(output), read_lines(other), strict=True):
        for name, tolerance in (("loss", 1e-5), ("eval_loss", 1e-5), ("grad_norm", 1e-4)):
            assert found.get(name, 0) == pytest.approx(wanted.get(name, 0), rel=tolerance)
    weights, others = read_weights(other), read_weights(output)
    assert max(np.abs(others[n] - w).max() for n, w in weights.items() if n.startswith("model.")) < 1e-5


def test_a_checkpoint_with_nan_ends_the_command_with_2(
    data: Path, tmp_path: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    path = poison(tmp_path / "model")
    arguments = [str(data), str(tmp_path / "out"), "--model", str(path), "--max-tiles", "2", "--device", "cpu"]
    assert run_command([*arguments, "--max-steps", "1"]) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last == f"error: {path} has NaN or infinite values in vte.weight; use a sound checkpoint"
    assert not (tmp_path / "out" / "model").exists()


def poison(directory: Path) -> Path:
    """Write a checkpoint with a weight that is NaN."""
    shutil.copytree(TINY, directory)
    path = next(directory.glob("*.safetensors"))
    weights = load_file(path)
    weights["vte.weight"].flat[7] = np.nan
    save_file(weights, path)
    return directory


def test_the_model_is_used_at_once_and_its_card_says_how_it_was_made(
    undisturbed: Path, data: Path, ray_cluster: None
) -> None:
    captions = str(undisturbed.parent / "captions")
    model = str(undisturbed / "model")
    assert caption.main([str(data.parent / "0.png"), captions, "--model", model, "--max-new-tokens", "8"]) == 0
    assert read_results(captions).column("status").to_pylist() == ["ok"]
    assert list((undisturbed / "tensorboard").iterdir())
    card = (undisturbed / "model" / "README.md").read_text()
    assert "| stage | 4 |" in card and f"| start | {TINY} |" in card and "| steps | 20 |" in card


def test_a_finished_run_is_not_trained_again_and_refuses_other_options(undisturbed: Path, data: Path) -> None:
    before = (undisturbed / "training.html").stat().st_mtime_ns
    report = train(data, undisturbed, per_device_train_batch_size=8)
    assert report.steps == NUM_STEPS and (undisturbed / "training.html").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"learning-rate 0\.0001 there, 0\.1 here; seed 0 there, 1 here"):
        train(data, undisturbed, per_device_train_batch_size=8, learning_rate=0.1, seed=1)


def kill_driver(data: Path, output: Path, ray_address: str, pause_s: float | None) -> None:
    """Kill a job after its first checkpoint, or after `pause_s`."""
    job = Job(make_arguments(data, output), ray_address).start()
    if pause_s is None:
        wait_for(lambda: job.process.poll() is not None or has_checkpoint(output), 100)
    else:
        time.sleep(pause_s)
    job.kill()


def has_checkpoint(output: Path) -> bool:
    return any(output.glob("training_state/*/complete.json"))


def make_arguments(data: Path, output: Path) -> list[str]:
    config = make_train_config(data, output, **{**RUN, "per_device_train_batch_size": 8})
    given = config.model_dump(mode="json", exclude={"input", "output"}, exclude_unset=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return ["jobs.train", str(data), str(output), *flags]


def test_a_driver_that_is_killed_and_resumed_gives_the_same_bits(
    data: Path, undisturbed: Path, tmp_path: Path, ray_address: str
) -> None:
    output = tmp_path / "out"
    kill_driver(data, output, ray_address, None)
    assert not (output / "model").exists()
    train(data, output, per_device_train_batch_size=8)
    assert_bitwise_equal(output, undisturbed)


@pytest.mark.slow
def test_a_driver_that_is_killed_at_five_moments_gives_the_same_bits(
    data: Path, undisturbed: Path, tmp_path: Path, ray_address: str
) -> None:
    output, rng = tmp_path / "out", random.Random(0)
    for _ in range(5):
        kill_driver(data, output, ray_address, rng.uniform(2, 12))
    train(data, output, per_device_train_batch_size=8)
    assert_bitwise_equal(output, undisturbed)


def test_workers_start_again_from_the_last_checkpoint_when_one_dies(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kill_once(monkeypatch, at_step=10)
    train(data, tmp_path / "out", per_device_train_batch_size=8, dataloader_num_workers=1)
    assert "assistant\n[[It is " in caplog.text and "M parameters are trained" in caplog.text
    assert "a worker died" in caplog.text and "all start again from the last checkpoint" in caplog.text
    assert_bitwise_equal(tmp_path / "out", undisturbed)


def kill_once(monkeypatch: pytest.MonkeyPatch, *, at_step: int) -> None:
    """Kill the process of a worker while it takes this step."""
    import ray

    call, killed = WorkerGroup.call, list[int]()

    def call_or_kill(group: WorkerGroup, method: str, *arguments: Any) -> list[Any]:
        if arguments == (at_step,) and not killed:
            killed.append(at_step)
            ray.kill(group._workers[0])
        return call(group, method, *arguments)

    monkeypatch.setattr(WorkerGroup, "call", call_or_kill)


@pytest.mark.slow
def test_workers_that_die_again_and_again_stop_the_run(
    data: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_once(monkeypatch, at_step=1)
    with pytest.raises(ProcessesDie, match="workers died 1 time without a new checkpoint") as stopped:
        train(data, tmp_path / "out", max_restarts=0, max_steps=2)
    assert "the same command without --overwrite continues" in stopped.value.__notes__[0]


def test_pairs_in_a_store_start_at_the_reference_and_move_to_the_chosen_answer(
    tmp_path: Path, bucket: Any, ray_cluster: None
) -> None:
    bucket.put(str(write_data(tmp_path, 6, pairs=True).parent), "bucket/data", recursive=True)
    options = {"stage": "dpo", "learning_rate": 3e-3, "beta": 0.5, "save_steps": 20, "eval_rows": 0, "num_samples": 0}
    report = train("s3://bucket/data/data.json", "s3://bucket/out", **options)
    lines = [json.loads(line) for line in bucket.cat("bucket/out/metrics.jsonl").splitlines()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[-1]["reward_accuracy"] == 1.0 and lines[-1]["reward_margin"] > 1.0
    assert report.model == "s3://bucket/out/model" and bucket.exists("bucket/out/model/config.json")


@pytest.mark.slow
def test_adapters_are_written_apart_and_merged_into_the_model_also_if_it_is_divided(
    tmp_path: Path, data: Path, ray_cluster: None
) -> None:
    options = {"lora_rank": 4, "max_steps": 6}
    train(data, tmp_path / "whole", **options, per_device_train_batch_size=8)
    train(data, tmp_path / "divided", **options, **SHARES["divided"])
    assert_equal_steps(tmp_path / "divided", tmp_path / "whole")
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        found, wanted = (load_tensors(tmp_path / run / name) for run in ("divided", "whole"))  # numpy has no bfloat16
        assert found.keys() == wanted.keys()
        assert max(float((found[x].float() - wanted[x].float()).abs().max()) for x in wanted) < 0.01


def test_steps_end_at_each_event(tmp_path: Path) -> None:
    config = TrainConfig(input="d", output="o", model="m", logging_steps=4, save_steps=6, eval_steps=10)
    assert list(list_spans(config, 0, 13)) == [(0, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 13)]
    assert list(list_spans(config, 6, 13)) == [(6, 8), (8, 10), (10, 12), (12, 13)]
