"""Ray clusters of several nodes on this machine, with GPUs that Ray believes in, and what is left of a run on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.conftest import ROOT

_MARK = "OVIS_TEST_CLUSTER"
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
    """`nodes` beside the head: what `Cluster.add_node` takes. The head holds nothing unless `head` says so."""

    def __init__(self, *nodes: dict[str, Any], head: dict[str, Any] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.drivers: list[subprocess.Popen[str]] = []
        os.environ[_MARK] = self.mark
        try:
            self._cluster = Cluster(initialize_head=True, head_node_args=_node(**(head or {"num_cpus": 0})))
            self.nodes = [self.add(**node) for node in nodes]
        finally:
            del os.environ[_MARK]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, **node: Any) -> Any:
        os.environ[_MARK] = self.mark
        return self._cluster.add_node(**_node(**node))

    def kill(self, node: Any) -> None:
        """As when a spot machine is taken away."""
        self._cluster.remove_node(node, allow_graceful=False)

    def state(self) -> dict[str, Any]:
        """Actors that live, placement groups that exist, CPUs and GPUs that are held."""
        command = [sys.executable, "-c", _STATE, self.address]
        state: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return state

    def processes(self, title: str) -> list[int]:
        """Pids of this cluster's processes with `title` in their command line."""
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

    def wait_for_process(self, title: str, timeout_s: float = 60) -> int:
        deadline_s = time.monotonic() + timeout_s
        while not (pids := self.processes(title)):
            assert time.monotonic() < deadline_s, f"no process {title}"
            time.sleep(0.05)
        return pids[0]

    def assert_nothing_is_left(self, timeout_s: float = 30) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            # Ray Data keeps an actor of its own without resources for statistics, for the life of the cluster.
            state = self.state()
            ours = [name for name in state["actors"] if "MapWorker" in name or "Attempt" in name]
            ranks = self.processes("ovis_model.rank_process")
            if not ours and not ranks and not state["placement_groups"] and not any(state["held"].values()):
                return
            assert time.monotonic() < deadline_s, (state, ranks)
            time.sleep(0.5)

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        self._cluster.shutdown()


def _node(**options: Any) -> dict[str, Any]:
    return {"object_store_memory": 128 << 20, "include_dashboard": False, **options}


@contextmanager
def fake_gpu_cluster(*nodes: dict[str, Any], head: dict[str, Any] | None = None) -> Iterator[FakeGpuCluster]:
    cluster = FakeGpuCluster(*nodes, head=head)
    try:
        yield cluster
    finally:
        cluster.close()


class Driver:
    """`python -m tests.run_on_fake_gpus`: a run on a cluster, as a process of its own."""

    def __init__(self, cluster: FakeGpuCluster, inputs: Path, output: Path, **options: Any) -> None:
        self.log = output.with_suffix(".log")
        self.log.touch()
        given = json.dumps({"input": [str(inputs)], "output": str(output), **options})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.run_on_fake_gpus", given, str(self.log)],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        cluster.drivers.append(self.process)

    def finish(self, timeout_s: float = 180) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            out, err = self.process.communicate(timeout=30)
            raise AssertionError(f"not done after {timeout_s} s: {err}") from None
        return self.process.returncode, out, err

    def events(self) -> list[dict[str, Any]]:
        """What the replicas told: of each set of ranks {"leader", "ranks", "gpus"}, of each batch {"rows"}."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_for_rows(self, number: int, timeout_s: float = 90) -> None:
        deadline_s = time.monotonic() + timeout_s
        while sum(event.get("rows", 0) for event in self.events()) < number:
            assert self.process.poll() is None, self.finish()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
