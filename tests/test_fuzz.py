"""Mutated images, tars, tables and JSON, and odd directories, never crash or hang; each gives rows or one fault.

tests/stress/fuzz.py makes them: 1,000 images, 200 tars, 100 tables, 200 JSON files and 60 directories in about 15 s.
With --run-slow there are 20 times as many, in 5 minutes. tests/stress/corpus.py does the same to files of others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import skimage
import sklearn.datasets

from tests.stress.fuzz import LIMIT_S, load_originals
from tests.stress.mutations import mutate
from tests.support.roots import ROOT

FILES = {"images": 1000, "tars": 200, "tables": 100, "json": 200, "trees": 60}


@pytest.mark.parametrize("kind", FILES)
def test_mutated_files_are_read_or_refused_in_time(kind: str) -> None:
    outcomes = run_fuzz(kind, 0, FILES[kind])
    assert len(outcomes) > 1, f"all were {outcomes}: the mutations are too weak or too strong"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", FILES)
def test_many_mutated_files_are_read_or_refused_in_time(kind: str) -> None:
    run_fuzz(kind, FILES[kind], 20 * FILES[kind])


def run_fuzz(kind: str, first: int, last: int) -> Counter[str]:
    """Count the outcomes of mutated files; check that each was read in time and that the reader exited with 0."""
    command = [sys.executable, "-m", "tests.stress.fuzz", kind, str(first), str(last)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S * 40)
    lines: list[dict[str, Any]] = [json.loads(line) for line in finished.stdout.splitlines()]
    assert finished.returncode == 0, f"python -m tests.stress.fuzz {kind} {lines[-1]}: {finished.stderr[-3000:]}"
    ended = [line for line in lines if "end" in line]
    assert [line["end"] for line in ended] == list(range(first, last))
    slowest = max(ended, key=lambda line: line["s"])
    assert slowest["s"] < LIMIT_S, slowest
    return Counter(line["outcome"].partition(" ")[0] for line in ended)


def test_a_seed_always_gives_the_same_mutation() -> None:
    data = load_originals()[0]
    files = [mutate(data, seed, load_originals()) for seed in range(50)]
    assert files == [mutate(data, seed, load_originals()) for seed in range(50)]
    assert len(set(files)) > 45 and data not in files


def test_files_of_installed_packages_are_listed_and_read() -> None:
    places = [Path(package.__file__).parent / "data" for package in (skimage, sklearn.datasets)]
    command = [sys.executable, "-m", "tests.stress.corpus", *map(str, places)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert int(finished.stdout.splitlines()[-1].split()[0]) > 20
