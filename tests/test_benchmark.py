"""The engine benchmark runs end to end, and its floor matches the architecture's tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.engine import measure_engine, parse_options, read_commit
from benchmarks.workload import load_or_build_model
from ovis_model.config import SIZES
from ovis_model.engine.cost import Ceilings, compute_cost
from tests.support.golden_data import checkpoint_dir
from tests.support.roots import ROOT


def test_engine_and_transformers_generate_the_same_tokens() -> None:
    command = [
        "benchmarks.engine",
        "--model",
        str(checkpoint_dir("tiny56-tied")),
        "--image-size",
        "100x60",
        "--rows",
        "6",
    ]
    options = ["--output-median", "5", "--output-cap", "9", "--rounds", "1", "--peer-batch", "4"]
    run = subprocess.run(
        [sys.executable, "-m", *command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert {name: side["equal_rows"] for name, side in result["sides"].items()} == {
        "engine": 6,
        "transformers, batch 4": 6,
    }
    assert set(result["seconds"]) == {"preprocess", "vision", "prefill", "decode", "idle"}
    assert result["ratio"] > 0 and result["floor_ratio"] > 1 and 0 < result["slot_occupancy"] <= 1


def test_the_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A benchmark in a container prints its figures all the same."""
    assert len(read_commit()) >= 7
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_commit() == "unknown"


def test_the_floor_of_a_published_size_matches_the_architecture() -> None:
    """Ovis2-1B, one tile, compared with sums of the architecture's own tables; its decoder has 0.5 G parameters."""
    needed = compute_cost(SIZES["1B"], torch.bfloat16, tiles=1, prompt=293, output_lengths=[32, 32], slots=2)
    assert needed.vision_flops == pytest.approx(2 * 903e9, rel=0.02)
    assert needed.prefill_flops == pytest.approx(2 * 293 * 0.72e9, rel=0.05)
    assert needed.decode_bytes == pytest.approx(31 * 2 * 494e6, rel=0.05)
    fast, slow = Ceilings(1e15, 1e12), Ceilings(1e12, 1e9)
    assert needed.compute_floor_s(slow) == pytest.approx(1000 * needed.compute_floor_s(fast))


def test_a_shape_in_fp8_halves_its_layers_and_their_traffic() -> None:
    command = "--model 24x128 --dtype bfloat16 --quantization fp8 --no-peer --rounds 1 --image-size 112x112 --rows 3"
    args = parse_options([*command.split(), "--output-median", "3", "--output-cap", "4"])
    fp8 = measure_engine(args)
    bfloat16 = sum(p.nbytes for p in load_or_build_model("24x128", torch.device("cpu"), torch.bfloat16).parameters())
    assert fp8["sides"]["engine"]["rows"] == 3
    assert 0.5 < fp8["weights_gb"] * 1e9 / bfloat16 < 0.65
    sizes = {"tiles": 1, "prompt": 293, "output_lengths": [32, 32], "slots": 2}
    plain = compute_cost(SIZES["8B"], torch.bfloat16, **sizes).decode_bytes
    halved = compute_cost(SIZES["8B"], torch.bfloat16, **sizes, layer_bytes=1).decode_bytes
    assert 0.5 < halved / plain < 0.6


def test_fp8_weights_are_not_compared_with_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--quantization", "fp8"])
    assert "--quantization fp8 needs --no-peer" in capsys.readouterr().err


def test_ranks_run_without_transformers_and_time_their_exchange() -> None:
    command = ["benchmarks.engine", "--model", "24x128", "--ranks", "2", "--image-size", "112x112", "--rows", "3"]
    options = ["--output-median", "4", "--output-cap", "6"]
    run = subprocess.run(
        [sys.executable, "-m", *command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["ranks"] == 2 and result["output_tokens_per_s"] > 0
    assert all(microseconds > 0 for microseconds in result["exchange_us"].values())
