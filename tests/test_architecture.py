"""The import rules hold and detect violations, functions stay short, and dependencies are pinned."""

from __future__ import annotations

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.structure import count_body_lines, read_modules
from tests.support.longest_files import LONGEST
from tests.support.roots import ROOT

PACKAGES = ("benchmarks", "jobs", "demo", "pipelines", "ovis_model")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS: dict[str, dict[str, Any]] = {
    contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]
}

GPU_HALF = ("ovis_model.network", "ovis_model.engine", "ovis_model.training.")

# (contract, module that breaks it, line planted there, import that must be named in the report)
VIOLATIONS = [
    ("layers", "ovis_model.config", "import pipelines.schema", "ovis_model.config -> pipelines.schema"),
    ("layers", "pipelines.schema", "from demo import drawings", "pipelines.schema -> demo.drawings"),
    ("layers", "demo.drawings", "import jobs.cli", "demo.drawings -> jobs.cli"),
    ("pipeline", "pipelines.preprocess", "import pipelines.generate", "pipelines.preprocess -> pipelines.generate"),
    (
        "pipeline",
        "pipelines.media.images",
        "import pipelines.sources.tar",
        "pipelines.media.images -> pipelines.sources",
    ),
    (
        "pipeline",
        "pipelines.output.sink",
        "import pipelines.preprocess",
        "pipelines.output.sink -> pipelines.preprocess",
    ),
    ("model", "ovis_model.inputs.prompt", "from ovis_model.engine import sampling", "ovis_model.inputs.prompt -> "),
    ("model", "ovis_model.network.vision", "import ovis_model.engine.engine", "ovis_model.network.vision -> "),
    ("model", "ovis_model.config", "import ovis_model.grammar.regex", "ovis_model.config -> ovis_model.grammar.regex"),
    ("no-torch", "ovis_model.inputs.tiling", "import torch", "ovis_model.inputs.tiling -> torch"),
    ("no-torch", "ovis_model.tokenizer", "import transformers", "ovis_model.tokenizer -> transformers"),
    ("no-torch", "ovis_model.types", "import torch", "ovis_model.types -> torch"),
    ("no-torch", "pipelines.preprocess", "def f(): import torch", "pipelines.preprocess -> torch"),
    ("no-torch", "pipelines.media.images", "import ovis_model.network.layers", "pipelines.media.images -> ovis_model"),
    ("no-torch", "pipelines.pipeline", "import transformers", "pipelines.pipeline -> transformers"),
    ("model", "ovis_model.engine.engine", "import ovis_model.training.model", "ovis_model.engine.engine -> "),
    ("no-torch", "ovis_model.training.examples", "import torch", "ovis_model.training.examples -> torch"),
    ("no-pillow", "ovis_model.training.batch", "from PIL import Image", "ovis_model.training.batch -> PIL"),
    ("no-pillow", "ovis_model.network.vision", "from PIL import Image", "ovis_model.network.vision -> PIL"),
    ("model-alone", "ovis_model.checkpoint", "import ray", "ovis_model.checkpoint -> ray"),
    ("model-alone", "ovis_model.engine.engine", "def f(): import pyarrow", "ovis_model.engine.engine -> pyarrow"),
    ("ray-in-pipelines", "jobs.caption", "import ray.data", "jobs.caption -> ray"),
    ("ray-in-pipelines", "demo.drawings", "import pyarrow.parquet", "demo.drawings -> pyarrow"),
]


def test_import_rules_hold() -> None:
    result = run_import_linter(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("contract", "module", "line", "reported"), VIOLATIONS, ids=[f"{v[0]}: {v[3]}" for v in VIOLATIONS]
)
def test_breaking_an_import_rule_is_reported(
    tmp_path: Path, contract: str, module: str, line: str, reported: str
) -> None:
    copy_packages(tmp_path)
    with (tmp_path / module.replace(".", "/")).with_suffix(".py").open("a") as file:
        file.write(f"\n{line}\n")
    result = run_import_linter(tmp_path, "--contract", contract)
    assert result.returncode == 1
    assert f"{CONTRACTS[contract]['name']} BROKEN" in result.stdout
    assert reported in result.stdout


def test_every_import_rule_has_a_violation_that_is_tested() -> None:
    assert {contract for contract, *_ in VIOLATIONS} == set(CONTRACTS)


def test_cpu_half_and_driver_do_not_load_torch() -> None:
    """The rules above check import lines; this checks what is really loaded, also by libraries and `__init__`."""
    cpu_half = [
        name
        for name in list_modules("ovis_model")
        if not name.startswith(GPU_HALF) or name in CONTRACTS["no-torch"]["source_modules"]
    ]
    assert_unloaded(["ovis_model", *cpu_half], ("torch", "transformers", "ray", "pyarrow"))
    assert_unloaded([*list_modules("pipelines"), "jobs.caption", "jobs.demo"], ("torch", "transformers"))


def test_test_files_import_nothing_from_one_another() -> None:
    """Shared helpers are in tests/support, so that each test file can be read, moved and run alone."""
    importers = [*list_python_files(), *sorted((ROOT / "tests").rglob("*.py"))]
    found = [
        (str(path.relative_to(ROOT)), name) for path in importers for name in find_imported_tests(path.read_text())
    ]
    assert not found
    for line in (
        "from tests.test_a import b",
        "import tests.test_a",
        "from tests import test_a",
        "from . import test_a",
    ):
        assert find_imported_tests(f"def f(): {line}") == ["tests.test_a"]
    assert find_imported_tests("from tests.conftest import a") == ["tests.conftest"]


def test_the_longest_files_exist() -> None:
    missing = [name for name in LONGEST if not (ROOT / "tests" / f"{name}.py").exists()]
    assert not missing, f"tests/support/longest_files.py names {missing}"


def test_most_functions_are_short() -> None:
    lengths = sorted(measure_function_lengths(), reverse=True)
    worst = "\n".join(f"{lines:4} {name}" for lines, name in lengths[:10])
    assert statistics.median(lines for lines, _ in lengths) <= 10, worst
    assert sum(lines > 40 for lines, _ in lengths) < 0.05 * len(lengths), worst


def test_every_dependency_is_pinned() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = [
        *PYPROJECT["project"]["dependencies"],
        *(name for key in ("dev", "eval", "heif", "jxl", "s3", "video") for name in extras[key]),
    ]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    names = [re.split(r"[\[<>=~!; ]", requirement)[0] for requirement in wanted]
    assert {normalize_name(name) for name in names} <= {normalize_name(name) for name in pinned}


def run_import_linter(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(
        [*command, *arguments],
        cwd=directory,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def copy_packages(directory: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", directory)
    for source in list_python_files():
        target = directory / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def assert_unloaded(imported: list[str], unwanted: tuple[str, ...]) -> None:
    """Import in a fresh interpreter, one by one, so that a failure names the module that loads them."""
    program = (
        "import importlib, sys\n"
        f"for name in {imported!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = set({unwanted!r}) & set(sys.modules)\n"
        "    assert not loaded, f'importing {name} loads {loaded}'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def find_imported_tests(source: str) -> list[str]:
    """Return the modules of tests, and conftest, that a file in tests/ with this source imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in ("tests" if node.level == 1 else "", node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return [found[0] for name in names if (found := re.match(r"tests\.(test_\w+|conftest)", name))]


def measure_function_lengths() -> Iterator[tuple[int, str]]:
    """Yield the lines of each function's body without its docstring, and where it is."""
    for module in read_modules(ROOT):
        for function in module.functions:
            yield count_body_lines(function), f"{module.path}:{function.lineno} {function.name}"


def list_python_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def list_modules(package: str) -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(path.parts) for path in paths if path.name != "__init__"]


def normalize_name(name: str) -> str:
    """Normalize a package name the way the package index does before comparing names."""
    return re.sub(r"[-_.]+", "-", name).lower()
