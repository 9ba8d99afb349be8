"""The cause of a death is read from Ray, for processes that really end."""

from __future__ import annotations

import os
import signal
import time

import ray

from pipelines.cluster.exits import Exit, Process, find_exit, identify_process


class Member:
    def identify(self) -> tuple[Process, int]:
        return identify_process(), os.getpid()

    def leave(self) -> None:
        os._exit(3)


def test_the_exit_of_a_killed_process_is_read(ray_cluster: None) -> None:
    actor = ray.remote(Member).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    before, pid = ray.get(actor.identify.remote())
    os.kill(pid, signal.SIGKILL)
    after, _ = ray.get(actor.identify.remote(), timeout=60)
    assert after.actor == before.actor and after.worker != before.worker and after.node == before.node
    exit_ = wait_for_exit(before)
    assert (exit_.kind, exit_.is_outside, exit_.address) == ("unknown", False, before.address)
    assert "unexpectedly" in exit_.reason and f"on node {before.address}" in exit_.reason
    ray.kill(actor)


def test_a_process_of_a_node_that_ray_does_not_have_died_with_it(ray_cluster: None) -> None:
    exit_ = find_exit(Process("a" * 32, "b" * 56, "c" * 56, "10.0.0.9"))
    assert (exit_.kind, exit_.is_outside) == ("node", True) and "node 10.0.0.9 was lost" in exit_.reason


def wait_for_exit(process: Process) -> Exit:
    """Return the exit once Ray has recorded it: another process may start before that."""
    for _ in range(50):
        if "does not know" not in (found := find_exit(process)).reason:
            break
        time.sleep(0.1)
    return found
