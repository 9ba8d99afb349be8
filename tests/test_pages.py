"""Pages name what exists: commands, options, files, links, classes, functions, rules, hooks and the steps of CI."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from jobs.__main__ import JOBS
from tests.support.markdown import (
    PAGES,
    list_anchors,
    list_blocks,
    list_code_lines,
    list_links,
    list_spans,
    read_page,
    read_section,
    read_table,
)
from tests.support.roots import ROOT

ARCHITECTURE, CONTRIBUTING = ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"
PACKAGES = ("jobs", "demo", "benchmarks", "pipelines", "ovis_model")
PRODUCT = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

COMMAND = re.compile(r"(?:ovis2|python -m jobs)[ .]([a-z_-]+)([^\n`|;&>]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
MODULE = re.compile(r"python -m ((?:benchmarks|demo|tests)\.[\w.]+)")
MAKE = re.compile(r"^(?:.*&& )?make (?:[A-Z]+=\S+ )*([a-z -]+)")
IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*")

pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in list_links(page):
        if "://" not in link:
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not heading or heading in list_anchors(target), f"{page.name} links to {link}: no such heading"


@pages
def test_commands_and_options_exist(page: Path) -> None:
    for line in list_code_lines(page):
        for job, arguments in COMMAND.findall(line):
            name = job.replace("_", "-")
            if name not in JOBS and (page.name == "CHANGELOG.md" or (ROOT / "jobs" / f"{job}.py").exists()):
                continue  # of an earlier version, or a tool
            assert name in JOBS, f"{page.name} shows the job {job}"
            unknown = set(FLAG.findall(arguments)) - list_options(name)
            assert not unknown, f"{page.name} gives {job} the unknown options {sorted(unknown)}"
        for module in MODULE.findall(line):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), f"{page.name} runs {module}"


@pages
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {target for line in list_code_lines(page) for found in MAKE.findall(line) for target in found.split()}
    assert shown <= known


def test_every_page_is_in_the_index() -> None:
    index = set(list_links(ROOT / "docs" / "README.md"))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= index


def test_the_way_of_an_image_names_what_exists() -> None:
    names = list_names(read_section(ARCHITECTURE, "How one image travels"))
    assert len(names) > 35
    assert [name for name in names if name not in list_callables()] == []


@pytest.mark.parametrize("heading", ["Folders", "What happens on failure", "What each layer does not know"])
def test_other_sections_name_what_exists(heading: str) -> None:
    section = read_section(ARCHITECTURE, heading)
    contracts = {contract["id"] for contract in list_contracts()}
    assert [name for name in list_names(section) if name not in contracts and not is_defined(name)] == []
    assert [path for path in list_paths(section) if not (ROOT / path).exists()] == []


def test_every_import_rule_is_explained() -> None:
    rows = read_table(read_section(ARCHITECTURE, "What each layer does not know"), "rule in `pyproject.toml`")
    assert {row[0].strip("`") for row in rows} == {contract["id"] for contract in list_contracts()}


def test_every_folder_is_explained() -> None:
    rows = read_table(read_section(ARCHITECTURE, "Folders"), "folder")
    named = {row[0].strip("`").rstrip("/") for row in rows}
    packages = [*(ROOT / "pipelines").iterdir(), *(ROOT / "ovis_model").iterdir()]
    assert {str(path.parent.relative_to(ROOT)) for path in list_inits(packages)} <= named


def test_the_drawing_is_legible_in_both_schemes() -> None:
    drawing = (ROOT / "docs" / "architecture.svg").read_text()
    assert "prefers-color-scheme: dark" in drawing and "<title" in drawing and "http" not in drawing[100:]
    light, dark = drawing.split("@media")
    assert set(re.findall(r"^ +(\.\w+) \{", light, re.MULTILINE)) - {".head"} == set(
        re.findall(r"^ +(\.\w+) \{", dark, re.MULTILINE)
    )


def test_how_to_add_names_what_exists() -> None:
    section = read_section(CONTRIBUTING, "How to add")
    assert [name for name in list_names(section) if not is_defined(name)] == []
    assert [path for path in list_paths(section) if not (ROOT / path).exists()] == []


def test_contributors_run_tests_that_exist() -> None:
    for block in list_blocks(CONTRIBUTING, "bash"):
        for path in re.findall(r"tests/\w+\.py", block):
            assert (ROOT / path).exists()


def test_every_term_of_the_glossary_has_one_meaning() -> None:
    terms = [term for row in read_table(read_section(CONTRIBUTING, "Glossary"), "term") for term in row[0].split(", ")]
    assert len(terms) == len(set(terms)) > 40


def test_hooks_run_pinned_tools(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""A module."""\n\nimport os\n')
    for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]:
        python, *arguments = hook["entry"].split()
        assert python == ".venv/bin/python"
        result = subprocess.run([sys.executable, *arguments, str(tmp_path / "a.py")], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.py").read_text().strip() == '"""A module."""'  # the unused import is gone
    assert "ruff==" in (ROOT / "constraints.txt").read_text()


def test_ci_runs_what_contributors_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_a_report_of_a_bug_asks_for_what_is_needed() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    required = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert required == {"command", "happened", "stderr", "run-json", "versions"}


def list_names(section: str) -> list[str]:
    """Return the identifiers in code font, without placeholders, files and arguments."""
    spans = (re.sub(r"\(.*\)$", "", span) for span in list_spans(section))
    return [
        span
        for span in spans
        if IDENTIFIER.fullmatch(span) and "NAME" not in span and not re.search(r"\.(py|md|json|toml)$", span)
    ]


def list_paths(section: str) -> list[str]:
    spans = list_spans(section)
    return [span for span in spans if re.fullmatch(r"[\w./-]+", span) and "/" in span and "NAME" not in span]


def is_defined(name: str) -> bool:
    """Return whether the code defines the name: of a class, function, field or option, or a method as Class.method."""
    *modules, last = name.split(".")
    if len(modules) > 1:  # a.b.name
        path = (ROOT / "/".join(modules)).with_suffix(".py")
        return path.exists() and re.search(rf"^(def|class) {last}\b", path.read_text(), re.MULTILINE) is not None
    return name in list_definitions()


@cache
def list_definitions() -> frozenset[str]:
    fields = (name for path in PRODUCT for name in find_fields(ast.parse(path.read_text())))
    tests = (name for path in (ROOT / "tests").glob("*.py") for name in find_callables(ast.parse(path.read_text())))
    return list_callables().union(fields, tests)


@cache
def list_callables() -> frozenset[str]:
    return frozenset(name for path in PRODUCT for name in find_callables(ast.parse(path.read_text())))


def find_callables(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
        elif isinstance(node, ast.FunctionDef):
            yield node.name


def find_fields(tree: ast.Module) -> Iterator[str]:
    """Yield the names of variables, fields and keyword arguments."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.keyword(arg=str(name)):
                yield name


def list_contracts() -> list[dict[str, str]]:
    contracts: list[dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    return contracts


def list_inits(folders: list[Path]) -> list[Path]:
    return [folder / "__init__.py" for folder in folders if (folder / "__init__.py").exists()]


@cache
def list_options(job: str) -> set[str]:
    """Return the options in the job's own help."""
    command = [sys.executable, "-m", "jobs", job, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return set(FLAG.findall(result.stdout))


def test_definitions_are_found() -> None:
    assert is_defined("Ledger.read") and not is_defined("Ledger.nothing") and not is_defined("Nobody")
    assert read_page(CONTRIBUTING)
