"""Start Ray clusters of several nodes with fake GPUs on this machine; check that a run leaves nothing running."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.support.roots import ROOT

_MARK = "OVIS_TEST_CLUSTER"
BIN = Path(sys.executable).parent
_STATE = """
import json, sys
import ray
from ray._private.state import state
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
total, free = ray.cluster_resources(), ray.available_resources()
actors = [a["ActorClassName"] for a in state.actor_table(None).values() if a["State"] != "DEAD"]
groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
held = {name: total[name] - free.get(name, 0) for name in ("CPU", "GPU") if name in total}
print(json.dumps({"actors": actors, "placement_groups": len(groups), "held": held}))
"""


class FakeGpuCluster:
    """A head and `nodes`, each given as the arguments of `Cluster.add_node`; without `head` the head has no CPUs."""

    def __init__(self, *nodes: dict[str, Any], head: dict[str, Any] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.drivers: list[subprocess.Popen[str]] = []  # killed when the cluster closes
        os.environ[_MARK] = self.mark
        try:
            self._cluster = Cluster(initialize_head=True, head_node_args=_to_node_options(**(head or {"num_cpus": 0})))
            self.nodes = [self.add_node(**node) for node in nodes]
        finally:
            del os.environ[_MARK]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self, **node: Any) -> Any:
        os.environ[_MARK] = self.mark
        return self._cluster.add_node(**_to_node_options(**node))

    def kill_node(self, node: Any) -> None:
        """Kill a node without warning, as when a spot machine is reclaimed."""
        self._cluster.remove_node(node, allow_graceful=False)

    def read_state(self) -> dict[str, Any]:
        """Return the living actors, the number of placement groups, and the CPUs and GPUs in use."""
        command = [sys.executable, "-c", _STATE, self.address]
        state: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return state

    def find_processes(self, title: str) -> list[int]:
        """Return the pids of this cluster's processes with `title` in their command line."""
        found = []
        for directory in Path("/proc").iterdir():
            if directory.name.isdigit():
                try:
                    if self.mark.encode() in (directory / "environ").read_bytes() and title in (
                        (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    ):
                        found.append(int(directory.name))
                except OSError:
                    continue  # gone
        return found

    def wait_for_process(self, title: str, timeout_s: float = 300) -> int:
        deadline_s = time.monotonic() + timeout_s
        while not (pids := self.find_processes(title)):
            assert time.monotonic() < deadline_s, f"no process {title}"
            time.sleep(0.05)
        return pids[0]

    def assert_nothing_is_left(self, timeout_s: float = 200) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            # Ray Data keeps one actor for statistics, without resources, for the life of the cluster.
            state = self.read_state()
            ours = [name for name in state["actors"] if "MapWorker" in name or "Attempt" in name]
            processes = self.find_processes("ovis_model.engine.rank_process") + self.find_processes("ray::MapWorker")
            if not ours and not processes and not state["placement_groups"] and not any(state["held"].values()):
                return
            assert time.monotonic() < deadline_s, (state, processes)
            time.sleep(0.5)

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        self._cluster.shutdown()


def _to_node_options(**options: Any) -> dict[str, Any]:
    return {"object_store_memory": 128 << 20, "include_dashboard": False, **options}


@contextmanager
def start_gpu_cluster(*nodes: dict[str, Any], head: dict[str, Any] | None = None) -> Iterator[FakeGpuCluster]:
    cluster = FakeGpuCluster(*nodes, head=head)
    try:
        yield cluster
    finally:
        cluster.close()


class RayHead:
    """`ray start --head` with free ports and a temporary directory.

    With `node_types`, in the format of Ray's launcher, an autoscaler starts nodes of these types on this machine. The
    head has no CPU then.
    """

    def __init__(self, node_types: dict[str, Any] | None = None) -> None:
        self.drivers: list[subprocess.Popen[str]] = []
        self._directory = tempfile.mkdtemp(prefix="ray-")  # the paths of its sockets must be short
        ports = _find_free_ports(5)
        self.metrics_port = ports[4]
        self.dashboard = f"http://127.0.0.1:{ports[0]}"
        self.address = f"{ray.util.get_node_ip_address()}:{ports[1]}"
        autoscaling: tuple[str, ...] = ()
        if node_types:
            autoscaling = ("--autoscaling-config", self._autoscaling_config(node_types))
        self._environment = {
            **os.environ,
            "OVIS_TEST_HEAD": uuid.uuid4().hex,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # jobs run the cluster's `python`
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",  # used by the provider fake_multinode
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_metrics_report_interval_ms": "500",
        }
        self._process = subprocess.Popen(
            [
                *(
                    BIN / "ray",
                    "start",
                    "--head",
                    "--block",
                    "--num-cpus",
                    "0" if node_types else "4",
                    "--disable-usage-stats",
                ),
                *("--temp-dir", self._directory, "--object-store-memory", str(256 << 20)),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports[0]), "--port", str(ports[1])),
                *("--dashboard-agent-listen-port", str(ports[2]), "--ray-client-server-port", str(ports[3])),
                *("--metrics-export-port", str(ports[4])),
                *autoscaling,
            ],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_until_up(ports[0])

    def run_ray_job(self, *command: str) -> subprocess.Popen[str]:
        """Start `ray job ...` as a user would."""
        return subprocess.Popen(
            [str(BIN / "ray"), "job", command[0], "--address", self.dashboard, *command[1:]],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: object) -> tuple[int, str]:
        """Run the README's command to its end; return the exit code and what the user sees."""
        command = ("submit", "--working-dir", ".", "--", "python", "-m", "jobs.caption")
        process = self.run_ray_job(*command, *map(str, arguments))
        out, _ = process.communicate(timeout=500)
        return process.returncode, out

    def _autoscaling_config(self, node_types: dict[str, Any]) -> str:
        config = {
            "cluster_name": "fake",
            "max_workers": 8,
            "upscaling_speed": 10,
            "idle_timeout_minutes": 5,
            "provider": {"type": "fake_multinode", "gcs_address": self.address, "disable_node_updaters": True},
            "head_node_type": "ray.head.default",  # the name that this provider expects
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                **{name: {"node_config": {}, "min_workers": 0, **node} for name, node in node_types.items()},
            },
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in ("cluster_synced_files", "initialization_commands", "setup_commands")},
            **{name: [] for name in ("head_setup_commands", "worker_setup_commands", "rsync_exclude", "rsync_filter")},
            **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
            "file_mounts_sync_continuously": False,
        }
        path = Path(self._directory) / "autoscaling.json"
        path.write_text(json.dumps(config))
        return str(path)

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        # After SIGTERM, Ray would drain for half a minute.
        for pid in self._find_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _find_processes(self) -> list[int]:
        mark = self._environment["OVIS_TEST_HEAD"].encode()
        return [
            int(directory.name)
            for directory in Path("/proc").iterdir()
            if directory.name.isdigit() and mark in _read_environ(directory)
        ]

    def _wait_until_up(self, port: int) -> None:
        deadline_s = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline_s and self._process.poll() is None, "Ray does not start"
                time.sleep(0.2)


class Driver:
    """A run on a cluster in a separate process: `python -m tests.support.run_on_fake_gpus`."""

    def __init__(self, cluster: FakeGpuCluster | RayHead, inputs: Path, output: Path, **options: Any) -> None:
        self.log = output.with_suffix(".log")
        self.log.touch()
        given = json.dumps({"input": [str(inputs)], "output": str(output), **options})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.run_on_fake_gpus", given, str(self.log)],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        cluster.drivers.append(self.process)

    def finish(self, timeout_s: float = 400) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            out, err = self.process.communicate(timeout=30)
            raise AssertionError(f"not done after {timeout_s} s: {err}") from None
        return self.process.returncode, out, err

    def read_events(self) -> list[dict[str, Any]]:
        """Return what the replicas logged: {"leader", "ranks", "gpus"} per set of ranks, {"rows"} per batch."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_for_rows(self, number: int) -> None:
        self._wait(lambda: sum(event.get("rows", 0) for event in self.read_events()) >= number)

    def wait_for_leaders(self, number: int) -> list[dict[str, Any]]:
        """Wait for `number` sets of ranks; return the events of the first ones."""
        self._wait(lambda: len(self._read_leaders()) >= number)
        return self._read_leaders()[:number]

    def _read_leaders(self) -> list[dict[str, Any]]:
        return [event for event in self.read_events() if "leader" in event]

    def _wait(self, condition: Callable[[], bool], timeout_s: float = 400) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.finish()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


def _read_environ(directory: Path) -> bytes:
    try:
        return (directory / "environ").read_bytes()
    except OSError:
        return b""


def _find_free_ports(number: int) -> list[int]:
    """Return free ports outside of 10002-19999, which Ray assigns to its workers."""
    found: list[int] = []
    for port in range(random.randrange(20_000, 60_000), 65_000):  # another process may be searching too
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")
