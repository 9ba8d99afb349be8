"""A Ray that does not start on this machine: it is helped, or the reason is one sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.cluster.local_ray import choose_ray_directory, start_local_ray
from pipelines.cluster.process_limits import list_descendants
from pipelines.errors import RayNotStarted, ResourceError
from tests.support.roots import ROOT

START = """
from pipelines.cluster.ray_session import open_ray_session
with open_ray_session():
    import ray
    print(ray.get(ray.remote(lambda: "started").remote()))
"""
RUN = """
from contextlib import suppress
from pathlib import Path
import ray.data
from pipelines.cluster.ray_session import configure_ray_data, open_ray_session
class Echo:
    def __call__(self, batch):
        return batch
with open_ray_session():
    configure_ray_data(2**20)
    actors = ray.data.ActorPoolStrategy(size=1)
    rows = ray.data.range(3).map_batches(Echo, compute=actors, batch_size=1).iter_batches(batch_size=None)
    print(sum(len(batch["id"]) for batch in rows))
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"OVIS_TEST_RUN=local_ray" in (process / "environ").read_bytes():
                print((process / "cmdline").read_bytes().replace(b"\\0", b" ").decode())
"""
WITHOUT_NAME = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
SMALL_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")


def start_ray(*prefix: str, cwd: Path, program: str = START, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    settings.pop("RAY_ADDRESS", None)
    command = (*prefix, sys.executable, "-c", program)
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=150, check=False)


def skip_unless_permitted(*prefix: str) -> None:
    if subprocess.run((*prefix, "true"), capture_output=True, check=False).returncode:
        pytest.skip(f"this machine does not permit {prefix[0]}")


def test_a_long_tmpdir_and_a_user_without_name_do_not_keep_ray_from_starting(tmp_path: Path) -> None:
    """A TMPDIR of over 200 characters, a HOME without rights, spaces in the working directory, all at once."""
    long, spaces = tmp_path / ("x" * 200), tmp_path / "a folder with spaces"
    long.mkdir()
    spaces.mkdir()
    prefix = (
        () if subprocess.run((*WITHOUT_NAME, "true"), capture_output=True, check=False).returncode else WITHOUT_NAME
    )
    ended = start_ray(*prefix, cwd=spaces, TMPDIR=str(long), HOME="/proc")
    assert "started" in ended.stdout.split(), ended.stderr
    assert ended.stderr.startswith("Ray runs in /tmp/ray: ") and "RAY_TMPDIR" in ended.stderr


def test_a_local_ray_is_silent_and_runs_no_process_that_a_job_does_not_use(tmp_path: Path) -> None:
    ended = start_ray(cwd=tmp_path, program=RUN, OVIS_TEST_RUN="local_ray")
    assert (ended.stdout.splitlines()[0], ended.stderr) == ("3", "")
    for name in ("dashboard/dashboard.py", "monitor.py", "_StatsActor", "_AutoscalingCoordinatorActor"):
        assert name not in ended.stdout
    assert "gcs_server" in ended.stdout


def test_no_usable_directory_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.local_ray._MAX_ROOT_BYTES", 3)
    with pytest.raises(ResourceError, match=r"none of .*, /tmp, /var/tmp .*set RAY_TMPDIR .* at most 3 bytes"):
        choose_ray_directory({"TMPDIR": str(tmp_path)})


def test_ray_keeps_the_directory_that_it_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.local_ray._MAX_ROOT_BYTES", len(bytes(tmp_path)))
    assert choose_ray_directory({"TMPDIR": str(tmp_path)}) == f"{tmp_path}/ray"
    assert choose_ray_directory({"TMPDIR": "/", "RAY_TMPDIR": str(tmp_path)}) == f"{tmp_path}/ray"
    (tmp_path / "file").touch()
    assert choose_ray_directory({"TMPDIR": str(tmp_path / "file")}) == "/tmp/ray"


def test_a_ray_that_is_too_slow_is_started_twice_then_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's own limit is set to 0 s, as if the machine were busy; none of its processes is left."""
    import ray

    if ray.is_initialized():
        pytest.skip("another test of this process has started Ray")
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "0")
    before = _list_children()
    with pytest.raises(RayNotStarted, match=r"its logs are in /tmp/ray/session_.*/logs; tried twice.*ulimit -u is"):
        start_local_ray()
    assert "trying once more" in caplog.text
    assert _list_children() == before


def _list_children() -> set[str]:
    """Return the process ids of the living children of this process."""
    listed = subprocess.run(
        ("ps", "-o", "pid=,stat=,comm=", "--ppid", str(os.getpid())), capture_output=True, text=True
    )
    lines = [line.split() for line in listed.stdout.splitlines()]
    return {pid for pid, state, name, *_ in lines if not state.startswith("Z") and name != "ps"}


@pytest.mark.slow
def test_64_mb_of_shared_memory_suffice(tmp_path: Path) -> None:
    skip_unless_permitted(*SMALL_SHM)
    ended = start_ray(*SMALL_SHM, cwd=tmp_path)
    assert "started" in ended.stdout.split() and "WARNING" not in ended.stderr, ended.stderr


def test_a_user_with_too_few_processes_is_refused_at_once(tmp_path: Path) -> None:
    """The limit does not apply to root, so another user starts Ray."""
    limited = ("setpriv", "--reuid", "54321", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all")
    skip_unless_permitted(*limited)
    program = "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))" + START
    command = (*limited, sys.executable, "-c", program)
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": "/proc"}
    settings.pop("RAY_ADDRESS", None)
    started_s = time.monotonic()
    ended = subprocess.run(command, cwd="/", env=settings, capture_output=True, text=True, timeout=100, check=False)
    if "Permission denied" in ended.stderr:
        pytest.skip("another user cannot read this installation")
    line = ended.stderr.strip().splitlines()[-1]
    assert re.search(r"needs about 400 processes and threads, .* only \d+ more \(ulimit -u is 100\)", line), (
        ended.stderr
    )
    assert time.monotonic() - started_s < 20


def test_processes_that_a_process_has_started_are_found() -> None:
    with subprocess.Popen(("sh", "-c", "sleep 30 & echo $!; wait"), stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        sleeper = int(shell.stdout.readline())
        assert list_descendants(shell.pid) == [sleeper] and sleeper in list_descendants(os.getpid())
        os.kill(sleeper, signal.SIGKILL)
