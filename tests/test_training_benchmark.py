"""The benchmark of training runs on a tiny checkpoint, and its sides learn the same."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict

import pytest

from benchmarks.training import SIDES, count_tokens, parse_arguments, print_costs, run_side
from tests.support.training import TINY

ARGUMENTS = ["--model", str(TINY), "--steps", "2", "--batch-size", "5"]


def test_both_ways_of_ours_learn_the_same_and_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_arguments(ARGUMENTS)
    costs = [asdict(run_side(parse_arguments([*ARGUMENTS, "--side", side]))) for side in ("ours", "ours, recomputed")]
    assert costs[0]["losses"] == costs[1]["losses"] and len(costs[0]["losses"]) == 4
    assert costs[0]["flops"] < costs[1]["flops"]
    assert sum(costs[0]["forward_flops"].values()) == pytest.approx(costs[0]["flops"] / 3, rel=0.1)
    real, padded = count_tokens(args)
    assert 0 < real < padded
    results = {side: [costs[side.endswith("recomputed")]] for side in SIDES}
    print_costs(results, (real, padded), args)
    assert "times as many tokens per CPU second" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate")
def test_the_trainer_learns_the_same() -> None:
    ours, theirs = (run_side(parse_arguments([*ARGUMENTS, "--side", side])) for side in SIDES[:2])
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
