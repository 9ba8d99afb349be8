"""A RAY_ADDRESS that is no Ray head ends a job within 15 s with the right form, and leaves OUTPUT alone."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.cluster.address import check_address
from pipelines.errors import ResourceError
from tests.support.pictures import write_demo_pictures
from tests.support.processes import Job


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    with socket.create_server(("", 0)) as server:  # the probe asks for the node's own address, not 127.0.0.1
        yield server


@pytest.fixture
def web() -> Iterator[str]:
    """Yield HOST:PORT of an HTTP server, which the dashboard is too."""
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def start_job(address: str, tmp_path: Path) -> Job:
    pictures = tmp_path / "pictures"
    pictures.mkdir(parents=True)
    write_demo_pictures(pictures, 1)
    return Job(["jobs.caption", str(pictures), str(tmp_path / "out"), "--model", "demo"], address).start()


def test_a_silent_port_and_the_dashboard_end_a_job(silent: socket.socket, web: str, tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{silent.getsockname()[1]}", web]
    jobs = [start_job(address, tmp_path / str(i)) for i, address in enumerate(addresses)]
    for job, address in zip(jobs, addresses, strict=True):
        finished = job.finish(timeout_s=40)
        assert finished.exit_code == 2, finished.stderr
        [line] = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
        assert f"RAY_ADDRESS={address} " in line and "port 6379" in line and "ray job submit" in line
        assert "Traceback" not in finished.stderr
    assert not list(tmp_path.glob("*/out"))


def test_a_silent_port_is_given_up_within_15_s(silent: socket.socket) -> None:
    started_s = time.monotonic()
    with pytest.raises(ResourceError, match="connects, but no Ray head responds"):
        check_address(f"127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - started_s < 15


def test_ctrl_c_ends_the_attempt(silent: socket.socket, tmp_path: Path) -> None:
    job = start_job(f"127.0.0.1:{silent.getsockname()[1]}", tmp_path)
    silent.settimeout(30)
    waiting, _ = silent.accept()
    with waiting:
        started_s = time.monotonic()
        job.process.send_signal(signal.SIGINT)
        finished = job.finish(timeout_s=40)
    assert time.monotonic() - started_s < 5
    assert finished.exit_code == 1 and "stopped" in finished.stderr, finished.stderr
    assert not (tmp_path / "out").exists()
    job.wait_until_all_gone()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_urls_are_refused_with_the_right_form(address: str) -> None:
    with pytest.raises(ResourceError, match=r"URL.*HOST:PORT.*6379.*auto"):
        check_address(address)


def test_a_closed_port_is_refused() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError, match=r"does not respond.*HOST:PORT"):
            check_address(f"127.0.0.1:{unused.getsockname()[1]}")


def test_a_head_and_auto_are_accepted_at_once(ray_address: str) -> None:
    started_s = time.process_time(), time.monotonic()
    check_address(ray_address)
    check_address("auto")
    assert time.process_time() - started_s[0] < 0.1 and time.monotonic() - started_s[1] < 5


def test_a_wrong_token_is_left_to_ray(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ResourceError, match="not as a Ray head"):
        check_address(ray_address)


def test_ray_clients_port_is_refused(ray_address: str) -> None:
    from ray.util.client.server.server import serve

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    server = serve("127.0.0.1", port)
    with pytest.raises(ResourceError, match="not as a Ray head"):
        check_address(f"127.0.0.1:{port}")
    server.stop(0)
