"""The figures about the code base are correct, for this layout and for the first one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.structure import begins_with_verb, find_language, measure
from tests.support.roots import ROOT

STAGE = '''"""A stage."""

from typing import Any

from pipelines.config import RunConfig

Row = dict[str, Any]
_MOST_ROWS = 3


class Stage:
    def __init__(self, config: RunConfig) -> None:
        """Of the whole run."""
        self.almost_done = config

    @property
    def name(self) -> str:
        return "stage"

    def make_rows(self, rows: list[Row], at_most: int) -> list[Row]:
        """Return the rows."""
        kept = rows[:at_most]
        return kept


def last(row: Row) -> None: ...
'''
CHECKOUT = {
    "jobs/caption.py": "\n\n",
    "pipelines/__init__.py": "",
    "pipelines/stage.py": STAGE,
    "pipelines/config.py": "class RunConfig:\n    pass\n",
    "pyproject.toml": "[project]\n\n[tool.importlinter]\n\n[[tool.importlinter.contracts]]\nid = 'x'\n",
    "README.md": "x" * 111 + "\n" + "x" * 110 + "\n",
    "docs/page.md": "y" * 200 + "\n",
}


def write_checkout(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_figures_of_a_small_checkout_are_correct(tmp_path: Path) -> None:
    figures = measure(write_checkout(tmp_path, CHECKOUT))
    assert (figures["jobs: lines"], figures["pipelines: files"], figures["demo: files"]) == (2, 3, 0)
    assert figures["largest class 1"] == "3 methods, pipelines/stage.py Stage"
    assert (figures["functions"], figures["lines of a function: max"]) == (4, 2)
    assert figures["most modules in a folder"] == "2 in pipelines/"
    assert figures["modules that import the whole configuration"] == 1
    assert figures["aliases Row = dict[str, Any]"] == 1
    assert figures["functions annotated with such a Row"] == 2
    assert figures["lines of import rules"] == 4
    assert figures["function docstrings that begin with a verb"] == "50.0% (1 of 2)"
    assert figures["function names that begin with a verb"] == "50.0% (1 of 2)"
    assert figures["names with most_"] == 1
    assert figures["doc lines over 110 characters"] == 2


@pytest.mark.parametrize(
    ("script", "tool"), [("tests/bench_scale.py", "jobs/floor.py"), ("benchmarks/scale.py", "benchmarks/roofline.py")]
)
def test_both_layouts_have_the_same_product(tmp_path: Path, script: str, tool: str) -> None:
    figures = measure(write_checkout(tmp_path, {**CHECKOUT, script: "x = 1\n", tool: "y = 1\n"}))
    assert figures["benchmark scripts: files"] == figures["benchmark scripts: lines"] == 1
    assert figures["product: files"] == 5


@pytest.mark.parametrize("text", ["Return the rows.", "Run `job` ->", "_read_rows", "yield"])
def test_verbs_are_recognised(text: str) -> None:
    assert begins_with_verb(text)


@pytest.mark.parametrize("text", ["Of all rows.", "Returns the rows.", "[B, T] of them", "rows", "_"])
def test_other_words_are_not_counted_as_verbs(text: str) -> None:
    assert not begins_with_verb(text)


def test_the_command_ends_with_json() -> None:
    figures = json.loads(run_structure().splitlines()[-1])
    assert figures["product: lines"] > 10_000


def test_the_language_of_this_project_stays_plain() -> None:
    figures = json.loads(run_structure().splitlines()[-1])
    assert read_percent(figures["function docstrings that begin with a verb"]) >= 90
    assert read_percent(figures["function names that begin with a verb"]) >= 80
    assert figures["names with most_"] == figures["public names defined in more than one module"] == 0
    assert figures["doc lines over 110 characters"] == 0


def test_the_list_names_what_falls_short(tmp_path: Path) -> None:
    lines = list(find_language(write_checkout(tmp_path, CHECKOUT)))
    assert any(line.endswith("characters") for line in lines)
    assert any(" docstring " in line for line in lines) and any(" name " in line for line in lines)


def run_structure() -> str:
    """Return what the command prints about this project."""
    command = [sys.executable, "-m", "benchmarks.structure"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def read_percent(figure: str) -> float:
    """Return 54.3 for "54.3% (360 of 663)"."""
    return float(figure.partition("%")[0])


def test_a_root_without_the_packages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the root of a checkout"):
        measure(tmp_path)
