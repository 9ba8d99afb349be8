"""What README.md shows exists: commands, options, make targets, files, links and columns."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import schema
from tests.support.roots import ROOT

README = ROOT / "README.md"
FOLDERS = ("jobs", "pipelines", "ovis_model", "tests", "docs", ".ci")

JOB = re.compile(r"python -m (jobs\.\w+)([^\n`|;&#>]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
MAKE = re.compile(r"\bmake (?:[A-Z]+=\S+ )*((?:[a-z]+ ?)+)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(rf"(?<![\w/.:*-])(?:(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*+|[\w/-]+\.(?:py|md))(?![\w*<])")


def test_commands_name_jobs_and_options_that_exist() -> None:
    for job, arguments in shown_commands():
        unknown = set(FLAG.findall(arguments)) - options(job)
        assert not unknown, f"README.md gives {job} the unknown options {sorted(unknown)}"


def test_make_targets_exist() -> None:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {target for line in code_lines() for targets in MAKE.findall(line) for target in targets.split()}
    assert {"demo", "test"} <= shown <= known


def test_links_lead_somewhere() -> None:
    for link in LINK.findall(readme()):
        if "://" not in link:
            path, _, heading = link.partition("#")
            target = ROOT / path if path else README
            assert target.exists(), f"README.md links to {link}, which is not there"
            assert not heading or heading in anchors(target), f"README.md links to {link}: no such heading"


def test_files_named_exist() -> None:
    named = {name.rstrip("./") for name in FILE.findall(readme())}
    assert named
    missing = sorted(name for name in named if not (ROOT / name).exists() and name not in file_names())
    assert not missing, f"README.md names {missing}"


def test_output_columns_are_those_of_the_schema() -> None:
    table = [(name, type_) for name, type_ in column_table() if name != "kept columns"]
    assert table == [(field.name, type_name(field.type)) for field in schema.OUTPUT]


@pytest.mark.parametrize(
    ("type_", "name"),
    [(pa.string(), "string"), (pa.float32(), "float32"), (pa.list_(pa.float32()), "list<float32>")],
)
def test_type_names_are_those_of_the_table(type_: pa.DataType, name: str) -> None:
    assert type_name(type_) == name


@cache
def readme() -> str:
    """The text, with commands that go on after a backslash joined into one line."""
    return re.sub(r"\\\n\s*", " ", README.read_text())


def code_lines() -> list[str]:
    """Lines of code blocks and code spans, without the comments in them."""
    parts = re.split(r"^```.*$", readme(), flags=re.MULTILINE)
    spans = [span for prose in parts[::2] for span in re.findall(r"`([^`]+)`", prose)]
    return [re.sub(r"#.*", "", line) for code in [*parts[1::2], *spans] for line in code.splitlines()]


def shown_commands() -> list[tuple[str, str]]:
    commands = JOB.findall(readme())
    assert commands
    return commands


@cache
def options(job: str) -> set[str]:
    """Options in the job's own help. Fails if there is no such job."""
    command = [sys.executable, "-m", job, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, f"README.md shows {job}: {result.stderr}"
    return set(FLAG.findall(result.stdout))


def anchors(markdown: Path) -> set[str]:
    """Link targets that the headings of a Markdown file give."""
    headings = re.findall(r"^#+ +(.+)$", markdown.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@cache
def file_names() -> set[str]:
    """Names without a folder, as the README's file tree shows them."""
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}


def column_table() -> list[tuple[str, str]]:
    """Column and type, of the rows of the table whose head begins with `column`; a row may name several columns."""
    table = re.search(r"^\| *column *\|.*\n\|[-| :]+\n((?:\|.*\n)+)", readme(), re.MULTILINE)
    assert table, "README.md has no table that begins with | column |"
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in table[1].splitlines()]
    return [(name.strip(" `"), type_) for names, type_ in rows for name in names.split(",")]


def type_name(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"list<{type_name(type_.value_type)}>"
    return {"float": "float32", "double": "float64"}.get(str(type_), str(type_))
