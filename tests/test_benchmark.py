"""The benchmark runs end to end and both sides generate the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT
from tests.golden_data import checkpoint_dir


def test_both_sides_generate_the_same() -> None:
    command = ["jobs.benchmark", "--model", str(checkpoint_dir("tiny56-tied")), "--image-size", "100x60", "--rows", "6"]
    options = ["--output-median", "5", "--output-cap", "9", "--rounds", "1", "--peer-batch", "4"]
    run = subprocess.run(
        [sys.executable, "-m", *command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["equal_rows"] == {"engine": 6, "transformers, batch 4": 6}
    assert result["ratio"] > 0 and result["floor_s"] > 0 and 0 < result["slot_occupancy"] <= 1


def test_ranks_generate_alone() -> None:
    command = ["jobs.benchmark", "--model", "24x128", "--ranks", "2", "--image-size", "112x112", "--rows", "3"]
    options = ["--output-median", "4", "--output-cap", "6"]
    run = subprocess.run(
        [sys.executable, "-m", *command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["ranks"] == 2 and result["output_tokens_per_s"] > 0
    assert all(microseconds > 0 for microseconds in result["exchange_us"].values())
