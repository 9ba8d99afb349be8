"""What all tests share: options, markers and one Ray for the session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# Before torch and Ray are imported: threads that wait must not spin on a machine of two cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
if "PYTEST_XDIST_WORKER" in os.environ:  # the other processes need the other cores
    os.environ["OMP_NUM_THREADS"] = "1"

# A machine that others use too may take any time over an example. The same examples each time, so that a test fails for
# what was changed; --hypothesis-profile=search draws new ones.
settings.register_profile("shared machine", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("shared machine")

# What the modules of tests.support assert is explained as in a test.
pytest.register_assert_rewrite("tests.support")

# A shell's background jobs ignore Ctrl-C, and so would all processes that the tests start there and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take more than a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from tests.support.longest_files import LONGEST

    slow = pytest.mark.skip(reason="takes more than a minute; run with --run-slow")
    gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not _has_gpu():
            item.add_marker(gpu)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """An S3 server, set up as a user would: by the environment, which the processes of `ray_cluster` have too."""
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
    """A file system with an empty `s3://bucket`, removed after the test."""
    from tests.support.buckets import create_bucket

    with create_bucket() as fs:
        yield fs


@pytest.fixture(scope="session")
def ray_cluster(endpoint: str) -> Iterator[None]:
    """One local Ray for all tests of this process; jobs that run in it join it and leave it running."""
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


@pytest.fixture
def ray_address(ray_cluster: None) -> str:
    """The Ray of this process, for jobs that run as processes of their own and need not start one."""
    import ray

    return str(ray.get_runtime_context().gcs_address)
