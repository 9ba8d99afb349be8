"""A node whose workers cannot import a package is named in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cluster.ray_session import describe_missing_package
from tests.support.pictures import write_demo_pictures
from tests.support.processes import Job
from tests.support.roots import ROOT

# Python runs this file at its start: the driver keeps the package, Ray's workers lose it.
LACKING = """
import sys
if any("default_worker" in argument for argument in sys.orig_argv):
    sys.modules[{package!r}] = None
"""


@pytest.mark.parametrize("package", ["av", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_node_that_lacks_a_package_is_named(package: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LACKING.format(package=package))
    (tmp_path / "pictures").mkdir()
    write_demo_pictures(tmp_path / "pictures", 1)
    command = ["jobs.caption", str(tmp_path / "pictures"), str(tmp_path / "out"), "--model", "demo"]
    job = Job(command, environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}).start()
    finished = job.finish(200)
    assert finished.exit_code == 1 and "Traceback" not in finished.stderr, finished.stderr
    line = finished.stderr.splitlines()[-1]
    assert line.startswith("error: node ") and package in line and "install this project" in line
    job.wait_until_all_gone()


def test_the_address_of_the_node_is_found() -> None:
    trace = "ray::MapWorker.__init__() (pid=7, ip=10.0.0.5, actor_id=1)\n  import av\nImportError: libav.so.61: no file"
    assert describe_missing_package(trace).startswith("node 10.0.0.5 cannot import a package that the run needs (libav")
    assert describe_missing_package("ValueError: ImportError") == ""
