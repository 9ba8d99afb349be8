"""The acceptance run of a GPU works on a CPU with tiny shapes, without optional packages, whatever a line does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_acceptance
from benchmarks.gpu_acceptance import LINES, Result, Threshold, _compare, format_table
from benchmarks.gpu_measurements import Figures
from tests.support.roots import ROOT

TINY = ["gpu_acceptance", "--tiny", "--device", "cpu"]


def run_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Figures]:
    monkeypatch.setattr(sys, "argv", [*TINY, *options])
    code = gpu_acceptance.main()
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("part", [1, 2, 3])
def test_all_lines_of_a_part_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: int
) -> None:
    """The thresholds are for a GPU, so the verdicts do not matter."""
    _, report = run_part(monkeypatch, capsys, "--part", str(part), "--in-process")
    assert {line["name"] for line in report["lines"]} >= {line.name for line in LINES if line.part == part}
    assert {line["status"] for line in report["lines"] if not line["name"].startswith("34B")} == {"ok"}, report


SITE = """
import os, sys
sys.modules.update(dict.fromkeys(("ray", "flash_attn", "llguidance", "pytest_rerunfailures")))
if "--line" in sys.orig_argv and "norms" in sys.orig_argv:
    os.abort()
if "--line" in sys.orig_argv and "visual head" in sys.orig_argv:
    print("RuntimeError: CUDA error: an illegal memory access was encountered", file=sys.stderr)
    os._exit(1)
"""


def test_lines_that_die_leave_the_others(tmp_path: Path) -> None:
    """A fault of the device ends a process; Ray, flash-attn and llguidance cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    lines = "--only", "norms", "visual head", "uploads"
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", *TINY[1:], *lines]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    report = json.loads(run.stdout.splitlines()[-1])
    assert {line["name"]: line["verdict"] for line in report["lines"]} == {
        "visual head": "failed: RuntimeError: RuntimeError: CUDA error: an illegal memory access was encountered",
        "norms": "failed: RuntimeError: exit code -6",
        "uploads": "pass",
    }
    assert run.returncode == 1


def test_lines_are_compared_where_both_have_run() -> None:
    bfloat16, fp8 = (Result(name, "ok", figures={"images_per_s": n}) for name, n in (("8B", 5.0), ("8B in FP8", 6.0)))
    [found] = _compare([bfloat16, fp8, Result("1B", "ok", figures={"decode_s": 1.0})])
    assert found.name == "FP8 on 8B" and found.verdict == "pass"
    fp8.figures["images_per_s"] = 5.1
    [found] = _compare([bfloat16, fp8])
    assert found.verdict == "images_per_s, 8B in FP8 / 8B 1.02 < 1.1"
    assert list(_compare([bfloat16, Result("8B in FP8", "failed", "FP8 needs capability 8.9")])) == []


def test_lines_without_time_are_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = run_part(monkeypatch, capsys, "--minutes", "0.1", "--part", "2")
    assert {line["verdict"] for line in report["lines"]} == {"skipped: the time is used up"}
    assert not report["passed"]


def test_thresholds_say_what_misses_them() -> None:
    least, most = Threshold("images_per_s", at_least=20), Threshold("ms_per_tile", at_most=3.3)
    assert least.find_fault({"images_per_s": 20.0}) is None and most.find_fault({"ms_per_tile": 3.3}) is None
    assert least.find_fault({"images_per_s": 15.25}) == "images_per_s 15.2 < 20"
    assert most.find_fault({"ms_per_tile": float("nan")}) == "ms_per_tile nan > 3.3"
    assert most.find_fault({"ms_per_tile": None}) == "ms_per_tile is missing"


def test_the_table_has_a_row_for_each_line() -> None:
    figures = {"images_per_s": 21.5, "planned_gb": 50.0, "weights_gb": 2.3}
    head, _, row, failed = format_table([Result("1B", "ok", figures=figures), Result("8B", "failed", "it burned")])
    assert "| weights + planned GB |" in head and "| 52.3 |" in row and row.endswith("| pass |")
    assert failed.endswith("| failed: it burned |")


def test_names_of_lines_are_unique_and_cover_three_parts() -> None:
    assert len({line.name for line in LINES}) == len(LINES)
    assert {line.part for line in LINES} == {1, 2, 3}
