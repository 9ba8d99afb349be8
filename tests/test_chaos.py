"""Whole runs survive the events of `python -m tests.stress.chaos`: one by default, all of them with --run-slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.stress.chaos import ALL_EVENTS, Chaos


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"), num_rows=96)


@pytest.mark.slow
@pytest.mark.parametrize("event", ALL_EVENTS)
def test_a_disturbed_run_equals_an_undisturbed_one(chaos: Chaos, event: str) -> None:
    if event == "disk" and os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    outcome = chaos.run(event, seed=3)
    assert outcome.is_hit
    assert outcome.is_equal
    assert outcome.written_rows_read_again == 0


def test_the_comparison_notices_a_missing_file(chaos: Chaos) -> None:
    undisturbed: Path = chaos.pictures.parent / "undisturbed"
    assert chaos.is_equal(undisturbed)
    next((undisturbed / "data").glob("*.parquet")).unlink()
    assert not chaos.is_equal(undisturbed)
