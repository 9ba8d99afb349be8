"""Run jobs in processes as users do; watch their process trees and the files that they open."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.roots import ROOT

# For tests that stop running processes: on a busy machine the process may finish first. Such a test is retried once if
# it fails, and the summary names it.
against_the_clock = pytest.mark.flaky(reruns=1)

_MARK = "OVIS_TEST_RUN"
_AGENTS = {"ray::DashboardA", "ray::RuntimeEnv"}  # the kernel truncates the names
_AGENTS_S = 5.0  # time for agents to exit before the test kills them
_IN_OPEN, _IN_ISDIR, _IN_NONBLOCK = 0x20, 0x40000000, 0o4000


@dataclass
class Job:
    """A process that runs `python -m` with `arguments`."""

    arguments: list[str]
    ray_address: str | None = None  # None: the job starts its own Ray
    environment: dict[str, str] = field(default_factory=dict)  # added to this process's environment
    process: subprocess.Popen[str] = field(init=False)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> Job:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self.environment, _MARK: self.mark}
        environment.pop("RAY_ADDRESS", None)
        if self.ray_address:
            environment["RAY_ADDRESS"] = self.ray_address
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def finish(self, timeout_s: float = 500) -> Finished:
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return Finished(self.process.returncode, out, err)

    def kill(self) -> None:
        """SIGKILL the driver alone, as an out-of-memory killer would."""
        self.process.kill()
        self.process.communicate()

    def find_actors(self, stage: str) -> list[int]:
        """Return the pids of a stage's actors, found by the process name that Ray sets."""
        return [pid for pid in self._find_descendants() if stage in _read_command(pid)]

    def wait_until_all_gone(self, timeout_s: float = 120) -> None:
        """Wait until every process that this job started has exited; raise AssertionError after the timeout.

        Ray's two agents of a node may outlive a raylet that is killed while they start. They hold no resources, so the
        test kills them.
        """
        deadline_s = time.monotonic() + timeout_s
        while left := self._find_descendants():
            if set(left.values()) <= _AGENTS and time.monotonic() > deadline_s - timeout_s + _AGENTS_S:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline_s, f"left running: {left}"
            time.sleep(0.2)

    def _find_descendants(self) -> dict[int, str]:
        found = {}
        for directory in Path("/proc").iterdir():
            if directory.name.isdigit():
                try:
                    if self.mark.encode() in (directory / "environ").read_bytes():
                        found[int(directory.name)] = (directory / "comm").read_text().strip()
                except OSError:
                    continue  # gone, or not ours
        return found


def _read_command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""  # gone


@dataclass(frozen=True)
class Finished:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        assert self.stdout, f"exit code {self.exit_code}, nothing on stdout: {self.stderr}"
        summary: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return summary


def run_caption(*arguments: object, ray_address: str | None = None, timeout_s: float = 500) -> Finished:
    return run_job("caption", *arguments, ray_address=ray_address, timeout_s=timeout_s)


def run_job(name: str, *arguments: object, ray_address: str | None = None, timeout_s: float = 500) -> Finished:
    """Run `python -m jobs.<name> ...` to its end and wait until all its processes have exited."""
    job = Job([f"jobs.{name}", *map(str, arguments)], ray_address).start()
    finished = job.finish(timeout_s)
    job.wait_until_all_gone()
    return finished


def list_files(output: Path) -> list[Path]:
    return list((output / "data").glob("rows-*.parquet"))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.0005)


class OpenCounter:
    """Counter of how often each file in a directory is opened by any process, as the kernel reports it (inotify)."""

    def __init__(self, directory: Path) -> None:
        self.opens: Counter[str] = Counter()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(_IN_NONBLOCK)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        assert libc.inotify_add_watch(self._fd, os.fsencode(directory), _IN_OPEN) >= 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> OpenCounter:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._drain()
        os.close(self._fd)

    def _follow(self) -> None:
        while not self._stopped.wait(0.02):
            self._drain()

    def _drain(self) -> None:
        while True:
            try:
                events = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return
            at = 0
            while at < len(events):
                _, mask, _, length = struct.unpack_from("iIII", events, at)
                name = events[at + 16 : at + 16 + length].rstrip(b"\0")
                if name and not mask & _IN_ISDIR:
                    self.opens[os.fsdecode(name)] += 1
                at += 16 + length
