"""`ray job submit` to a cluster that `ray start` made, as the README says it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from jobs.shapes import make_picture
from pipelines.sink import read_results
from tests.conftest import ROOT

NUM_ROWS = 120
BIN = Path(sys.executable).parent


class RayHead:
    """`ray start --head`, with ports and a directory of its own."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="ray-")  # its sockets' paths must be short
        ports = _free_ports(4)
        self.address = f"http://127.0.0.1:{ports[0]}"
        self._environment = {
            **os.environ,
            "OVIS_TEST_HEAD": uuid.uuid4().hex,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the cluster's
            "RAY_AUTH_MODE": "disabled",
        }
        self._process = subprocess.Popen(
            [
                *(BIN / "ray", "start", "--head", "--block", "--num-cpus", "4", "--disable-usage-stats"),
                *("--temp-dir", self._directory, "--object-store-memory", str(256 << 20)),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports[0]), "--port", str(ports[1])),
                *("--dashboard-agent-listen-port", str(ports[2]), "--ray-client-server-port", str(ports[3])),
            ],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_until_up(ports[0])

    def ray(self, *command: str) -> subprocess.Popen[str]:
        """`ray job ...` on the user's side."""
        return subprocess.Popen(
            [str(BIN / "ray"), "job", command[0], "--address", self.address, *command[1:]],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: object) -> tuple[int, str]:
        """The command of the README, to its end -> the exit code and what the user sees."""
        process = self.ray("submit", "--working-dir", ".", "--", "python", "-m", "jobs.caption", *map(str, arguments))
        out, _ = process.communicate(timeout=120)
        return process.returncode, out

    def close(self) -> None:
        # SIGTERM would let it drain for half a minute.
        for pid in self._left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _left(self) -> list[int]:
        mark = self._environment["OVIS_TEST_HEAD"].encode()
        return [
            int(directory.name)
            for directory in Path("/proc").iterdir()
            if directory.name.isdigit() and mark in _environ(directory)
        ]

    def _wait_until_up(self, port: int) -> None:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline_s and self._process.poll() is None, "Ray does not start"
                time.sleep(0.2)


def _environ(directory: Path) -> bytes:
    try:
        return (directory / "environ").read_bytes()
    except OSError:
        return b""


def _free_ports(number: int) -> list[int]:
    """Outside of 10002-19999, which Ray gives to its workers."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 10_000, 65_000):
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    ray_head = RayHead()
    yield ray_head
    ray_head.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    for seed in range(NUM_ROWS):
        make_picture(seed, held_out=True)[0].save(directory / f"{seed:02}.png")
    return directory


@pytest.mark.timeout(300)
def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: RayHead, pictures: Path, tmp_path: Path
) -> None:
    """On two ranks. The same line, the same output, each row once."""
    arguments = [pictures, tmp_path / "out", "--model", "demo", "--tensor-parallel", 2, "--rows-per-file", 4]
    command = ["--working-dir", ".", "--", "python", "-m", "jobs.caption", *map(str, arguments)]
    client = JobSubmissionClient(head.address)
    job = head.ray("submit", "--submission-id", "first", *command)
    while not (tmp_path / "out" / "data").exists():  # the first rows are written
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    assert client.stop_job("first")  # what `ray job stop` does, without its start
    seen, _ = job.communicate(timeout=60)
    assert "in 2 ranks" in seen and "stopped; the same command" in seen
    done = read_results(str(tmp_path / "out"))
    assert 0 < len(done) < NUM_ROWS, "stopped too late"
    code, seen = head.submit(*arguments)
    assert code == 0, seen
    [summary] = [json.loads(line) for line in seen.splitlines() if line.startswith('{"rows"')]
    assert (summary["rows"], summary["ok"]) == (NUM_ROWS, NUM_ROWS)
    assert summary["skipped_done"] >= len(done)
    assert len(set(read_results(str(tmp_path / "out")).column("id").to_pylist())) == NUM_ROWS
    assert "succeeded" in seen


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_exit_codes_and_what_the_user_sees(head: RayHead, pictures: Path, tmp_path: Path) -> None:
    """The client's own code is 0 or 1; the job's is in the log, with the reason."""
    code, seen = head.submit(tmp_path / "nothing", tmp_path / "out", "--model", "demo")
    assert code == 1
    assert "failed with exit code 2" in seen and "nothing' does not exist" in seen
    code, seen = head.submit(pictures, tmp_path / "gpu", "--model", "demo", "--device", "cuda")
    assert code == 1
    assert "failed with exit code 2" in seen and "the cluster has no GPU; use --device cpu" in seen
    (tmp_path / "mixed").mkdir()
    for i, picture in enumerate(sorted(pictures.iterdir())[:20]):
        (tmp_path / "mixed" / picture.name).symlink_to(picture)
        (tmp_path / "mixed" / f"empty-{i}.png").touch()
    code, seen = head.submit(tmp_path / "mixed", tmp_path / "half", "--model", "demo", "--max-new-tokens", 2)
    assert code == 1
    assert "failed with exit code 3" in seen and "The most frequent reasons" in seen and '"error": 20' in seen
