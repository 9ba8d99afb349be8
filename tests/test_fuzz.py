"""Mutated images, tars and tables: no crash, no hang, one row or one fault each. They are mutated
by tests/stress/fuzz.py.

The full numbers, 1,000 images, 200 tars and 100 tables, take about 10 s; with --run-slow 20 times as many, 3 minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.stress.fuzz import LIMIT_S, load_originals
from tests.stress.mutations import mutate
from tests.support.roots import ROOT

FILES = {"images": 1000, "tars": 200, "tables": 100}


@pytest.mark.parametrize("kind", FILES)
def test_mutated_files(kind: str) -> None:
    outcomes = fuzz(kind, 0, FILES[kind])
    assert len(outcomes) > 1, f"all were {outcomes}: the mutations are too weak or too strong"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", FILES)
def test_many_mutated_files(kind: str) -> None:
    fuzz(kind, FILES[kind], 20 * FILES[kind])


def fuzz(kind: str, first: int, last: int) -> Counter[str]:
    """What became of the files, each of them in time; the process that reads them ends well."""
    command = [sys.executable, "-m", "tests.stress.fuzz", kind, str(first), str(last)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S * 40)
    lines: list[dict[str, Any]] = [json.loads(line) for line in finished.stdout.splitlines()]
    assert finished.returncode == 0, f"python -m tests.stress.fuzz {kind} {lines[-1]}: {finished.stderr[-3000:]}"
    ended = [line for line in lines if "end" in line]
    assert [line["end"] for line in ended] == list(range(first, last))
    slowest = max(ended, key=lambda line: line["s"])
    assert slowest["s"] < LIMIT_S, slowest
    return Counter(line["outcome"].partition(" ")[0] for line in ended)


def test_a_seed_gives_the_same_bytes() -> None:
    data = load_originals()[0]
    files = [mutate(data, seed, load_originals()) for seed in range(50)]
    assert files == [mutate(data, seed, load_originals()) for seed in range(50)]
    assert len(set(files)) > 45 and data not in files
