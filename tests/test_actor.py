"""An actor's process ends even if C code hangs at exit."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from pipelines.cluster.actor import register_fast_exit


class HangsAtExit:
    """An actor that hangs in a C exit handler after Python has ended, as Ray's C++ code may."""

    def __init__(self, *, ends_with_python: bool) -> None:
        if ends_with_python:
            register_fast_exit()
        libc = ctypes.CDLL(None)
        assert libc.on_exit(ctypes.cast(libc.pause, ctypes.c_void_p), None) == 0

    def get_pid(self) -> int:
        return os.getpid()


@pytest.mark.parametrize("ends_with_python", [True, False])
def test_end_with_python_ends_an_actor_that_hangs_at_exit(ray_cluster: None, ends_with_python: bool) -> None:
    actor = ray.remote(HangsAtExit).options(num_cpus=0).remote(ends_with_python=ends_with_python)
    pid = ray.get(actor.get_pid.remote())
    del actor
    try:
        deadline_s = time.monotonic() + (60 if ends_with_python else 2)
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert Path(f"/proc/{pid}").exists() != ends_with_python
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_driver_gets_no_exit_hook(ray_cluster: None) -> None:
    before = atexit._ncallbacks()
    register_fast_exit()
    assert atexit._ncallbacks() == before
