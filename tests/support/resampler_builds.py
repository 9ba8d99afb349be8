"""Build the compiled resampler as an installation does, from this checkout's source."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.roots import ROOT

NAME = "_ovis_resample"
SOURCES = tuple(f"ovis_model/inputs/resample{suffix}" for suffix in (".c", ".h", "_kernels.h"))
_NEEDED = ("pyproject.toml", "README.md", "LICENSE", "pipelines/__init__.py", *SOURCES)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine"
)


def build_resampler(
    directory: Path, edit: Callable[[str], str] = str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Build in a copy of the sources, the C edited; return how the build ended and the files that it made."""
    for name in _NEEDED:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    for name in SOURCES:
        source = directory / name
        source.write_text(edit(source.read_text()))
    finished = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext", "--inplace"],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return finished, [path for path in directory.iterdir() if path.suffix in (".so", ".pyd")]


def load_build(path: Path) -> ModuleType:
    """Load a build without registering it as a module."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
