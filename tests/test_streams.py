"""The last line of a job is JSON in any encoding; broken streams change neither the run nor its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.shell.streams import LossyStream
from pipelines.config import CaptionConfig
from pipelines.output.run_record import open_run
from pipelines.output.sink import write_file
from tests.support.outputs import make_results
from tests.support.pictures import encode_picture
from tests.support.roots import ROOT

COMPACT = f"{sys.executable} -m jobs.compact"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a finished run whose name is not ASCII."""
    root = tmp_path_factory.mktemp("streams")
    (root / "in").mkdir()
    for i in range(2):
        (root / "in" / f"{i}.png").write_bytes(encode_picture(i))
    output = root / "captions-é"
    run = open_run(
        CaptionConfig(input=(str(root / "in"),), output=str(output), model="demo"), {"id": "demo", "revision": None}
    )
    write_file(run.data_uri, make_results(range(2)))
    run.update(status="finished")
    return output


def run_shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command line of bash; its exit code is that of the job, also in a pipe."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=environment, capture_output=True)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {}],
)
def test_the_last_line_is_json_in_any_encoding(finished: Path, environment: dict[str, str]) -> None:
    done = run_shell(f"{COMPACT} '{finished}'", **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    assert json.loads(done.stdout.decode(encoding).splitlines()[-1])["output"] == str(finished)


@pytest.mark.parametrize("redirection", [">&-", "| head -c 0", "> /dev/full", ">&- 2>&-", "2>&-", "<&- >&- 2>&-"])
def test_a_broken_stream_does_not_change_the_exit_code(finished: Path, redirection: str) -> None:
    # A reader that leaves makes the shell report the job's code too, as `head` exits with 0.
    done = run_shell(f"{COMPACT} '{finished}' {redirection}")
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert sorted(path.name for path in finished.iterdir()) == ["data", "manifest", "run.json"]
    if redirection == "> /dev/full":
        assert b"No space left on device" in done.stderr and b'"rows": 2' in done.stderr


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&1 >&3 3>&- | head -c 0"])
def test_usage_errors_keep_stdout_clean_without_stderr(redirection: str) -> None:
    done = run_shell(f"exec 3>&1; {COMPACT} a b c {redirection}")
    assert (done.returncode, done.stdout) == (2, b"")


def test_help_may_be_cut_off() -> None:
    done = run_shell(f"{sys.executable} -m jobs --help | head -c 0")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_lossy_stream_escapes_what_it_cannot_encode(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        stream = LossyStream(file.fileno(), "ascii")
        print("é and \udcff", file=stream)
    assert (tmp_path / "log").read_bytes() == b"\\xe9 and \\udcff\n" and stream.lost is None


JOB = """
import logging, os, sys, warnings
from pathlib import Path
from jobs.shell import prepare_process
prepare_process()
from jobs.cli import run_job
from jobs.demo import Comparison
def job():
    os.write(2, b"TIFFReadDirectory: Warning\\n")
    warnings.warn("this function is going away", FutureWarning)
    logging.getLogger("s3fs.core").warning("request 7 was retried")
    logging.getLogger("pipelines.pipeline").warning("waiting for a node")
    print("half of it is done", file=sys.stderr)
    if sys.argv[1] == "fail":
        raise OSError("the disk is full")
    return Comparison("0.png", "a", "a", 1)
sys.exit(run_job(job))
"""
OURS = ["waiting for a node", "half of it is done"]


def run_program(argument: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", JOB, argument],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_stderr_shows_our_lines_alone(tmp_path: Path) -> None:
    done = run_program("succeed", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr.splitlines(), list(tmp_path.iterdir())) == (0, OURS, [])


def test_a_failed_job_names_the_log_of_the_libraries(tmp_path: Path) -> None:
    done = run_program("fail", TMPDIR=str(tmp_path))
    *ours, place, error = done.stderr.splitlines()
    [log] = tmp_path.iterdir()
    assert done.returncode == 1 and ours == OURS and error.startswith("error: the disk is full")
    assert place == f"what libraries printed is in {log}"
    for words in ("TIFFReadDirectory", "going away", "s3fs.core: request 7 was retried"):
        assert words in log.read_text()
    assert "waiting" not in log.read_text()
