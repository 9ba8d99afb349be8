"""Shared by all tests: options, markers, an S3 server and one Ray for the session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Set before torch and Ray are imported. Waiting threads must not spin on a machine of two cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
if not Path("/dev/nvidiactl").exists():  # no NVIDIA driver: Triton's kernels run in its interpreter, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # leave the other cores to the other processes
    os.environ["OMP_NUM_THREADS"] = "1"

# An example may take any time on a shared machine, so there is no deadline. Examples are the same each time, so that
# only a change of the code makes a test fail; --hypothesis-profile=search draws new ones.
settings.register_profile("shared machine", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("shared machine")

# Assertions in tests.support get pytest's detailed messages too.
pytest.register_assert_rewrite("tests.support")

# A shell's background jobs ignore SIGINT, and so would the processes that tests start and interrupt there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take more than a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from tests.support.longest_files import LONGEST

    slow = pytest.mark.skip(reason="takes more than a minute; run with --run-slow")
    gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:  # their keywords include the names of folders, such as a checkout called gpu
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(slow)
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(gpu)
        if item.get_closest_marker("vllm") and find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="needs the package vllm; make test-vllm installs it"))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Yield the URL of an S3 server, configured through the environment, which `ray_cluster`'s processes inherit."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def bucket(endpoint: str) -> Iterator[Any]:
    """Yield a file system with an empty `s3://bucket`, which is removed after the test."""
    from tests.support.buckets import create_bucket

    with create_bucket() as fs:
        yield fs


@pytest.fixture(scope="session")
def ray_cluster(endpoint: str) -> Iterator[None]:
    """Run one local Ray for all tests of this process; jobs that run in it join it and leave it running."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=512 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """Yield a selenium driver of a Chromium of the module's own."""
    from tests.support.browser import start_chromium

    with start_chromium() as driver:
        yield driver


@pytest.fixture
def ray_address(ray_cluster: None) -> str:
    """Return the address of this process's Ray, so that jobs in separate processes need not start one."""
    import ray

    return str(ray.get_runtime_context().gcs_address)
