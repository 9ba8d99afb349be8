"""Every script in examples/ runs from end to end with the demo model, as its docstring says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from jobs.demo import draw_pictures
from pipelines.output.sink import read_results
from tests.support.buckets import BUCKET
from tests.support.roots import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw_pictures(folder, count=3, seed=1)


def run_example(name: str, *arguments: object, ray_address: str | None = None) -> str:
    """Run a script in a separate process and return its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"RAY_ADDRESS": ray_address} if ray_address else {})}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_listed_and_tested() -> None:
    listed = re.findall(r"^\| `(\w+\.py)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    tested = re.findall(r'run_example\(\s*"(\w+\.py)"', Path(__file__).read_text())
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(listed) == sorted(set(tested))


def test_caption_folder_prints_captions_and_resumes(
    drawn: tuple[Path, dict[str, str]], ray_address: str, tmp_path: Path
) -> None:
    folder, truths = drawn
    first = run_example("caption_folder.py", folder, tmp_path / "out", ray_address=ray_address)
    assert first.startswith(f"{len(truths)} captions, 0 errors, 0 already there")
    rows = pd.read_parquet(tmp_path / "out" / "data")
    assert all(f"{row.uri}\t{row.text}" in first for row in rows.itertuples())
    again = run_example("caption_folder.py", folder, tmp_path / "out", ray_address=ray_address)
    assert f"{len(truths)} already there" in again


def test_webdataset_s3_captions_every_member(bucket: object, ray_address: str) -> None:
    printed = run_example("webdataset_s3.py", f"{BUCKET}/prefix", ray_address=ray_address)
    rows = read_results(f"{BUCKET}/prefix/captions").to_pylist()
    assert [row["id"].rpartition("/")[2] for row in rows[:2]] == ["00000.tar#000000", "00000.tar#000001"]
    assert len(rows) == 8 and all(row["drawn"] in printed and row["text"] in printed for row in rows)
    assert sum(row["text"] == row["drawn"] for row in rows) >= 4


def test_annotate_schema_answers_within_the_schema(
    drawn: tuple[Path, dict[str, str]], ray_address: str, tmp_path: Path
) -> None:
    folder, truths = drawn
    run_example("annotate_schema.py", folder, tmp_path / "out", ray_address=ray_address)
    rows = read_results(str(tmp_path / "out")).to_pylist()
    schema = json.loads((EXAMPLES / "scene.json").read_text())
    for row, truth in zip(rows, truths.values(), strict=True):
        assert row["scene"]["colour"] in schema["properties"]["colour"]["enum"]
        assert f"on a {row['background']} background" in truth


def test_engine_captions_and_ranks_choices_without_ray(drawn: tuple[Path, dict[str, str]]) -> None:
    folder, truths = drawn
    paths = [folder / name for name in truths]
    lines = run_example("engine.py", *paths).splitlines()
    for line, path, truth in zip(lines, paths, truths.values(), strict=True):
        printed_path, caption, probabilities = line.split("\t")
        assert printed_path == str(path) and caption.endswith(" background.")
        background = truth.split()[-2]
        assert f"{background} 100%" in probabilities or f"{background} 9" in probabilities
