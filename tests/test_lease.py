"""One driver per OUTPUT: a living driver keeps others out, a dead one is replaced."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import LeaseError, LeaseLost
from pipelines.output import lease
from pipelines.output.lease import STALE_S, Lease


def test_a_second_driver_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    first, second = Lease(str(tmp_path)), Lease(str(tmp_path))
    with first:
        with pytest.raises(LeaseError, match=r"another run writes here: process \d+"), second:
            pass
        first.check()
    with Lease(str(tmp_path)) as third:
        third.check()
        with pytest.raises(LeaseLost):
            first.check()
        first.__exit__()  # keeps the lease that now belongs to another driver
        third.check()
    assert not (tmp_path / "driver.json").exists()


def test_a_dead_driver_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    script = f"import os\nfrom pipelines.output.lease import Lease\nLease({str(tmp_path)!r}).__enter__()\nos._exit(1)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (tmp_path / "driver.json").exists()
    with Lease(str(tmp_path)):
        pass


def test_a_zombie_driver_counts_as_dead(tmp_path: Path) -> None:
    script = (
        f"import time\nfrom pipelines.output.lease import Lease\nLease({str(tmp_path)!r}).__enter__()\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline_s = time.monotonic() + 100
        while not (tmp_path / "driver.json").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        with pytest.raises(LeaseError), Lease(str(tmp_path)):
            pass
        process.kill()
        while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
            time.sleep(0.01)
        with Lease(str(tmp_path)):
            pass


def test_a_reused_process_id_is_another_driver(tmp_path: Path) -> None:
    file = tmp_path / "driver.json"
    with Lease(str(tmp_path)):
        holder = json.loads(file.read_text())
    file.write_text(json.dumps({**holder, "started": "1"}))
    with Lease(str(tmp_path)):
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the times by 100."""
    for name, seconds in {"RENEW_S": 0.1, "STALE_S": 0.6, "_LOOK_S": 0.02}.items():
        monkeypatch.setattr(lease, name, seconds)


def write_holder(directory: Path, **changes: object) -> dict[str, Any]:
    """Write the lease of a driver that is not of this machine; return its content."""
    with Lease(str(directory)):
        holder: dict[str, Any] = json.loads((directory / "driver.json").read_text())
    holder |= {"host": "elsewhere", "pid": 1, "token": "its", **changes}
    (directory / "driver.json").write_text(json.dumps(holder))
    return holder


@pytest.mark.parametrize(
    "lost",
    [
        {},
        {"host": socket.gethostname(), "boot": "before the reboot"},
        {"at_s": time.time() - 3600},
        {"at_s": time.time() + 3600},
    ],
    ids=["lost head", "rebooted host", "long ago", "clock ahead"],
)
def test_the_lease_of_a_lost_driver_is_waited_out(
    quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: dict[str, object]
) -> None:
    holder = write_holder(tmp_path, **lost)
    with Lease(str(tmp_path)) as ours:
        ours.check()
    lines = [record.getMessage() for record in caplog.records]
    assert f"process 1 on {holder['host']}" in lines[0] and "this run takes over" in lines[-1]
    assert re.search(r"for \d+ more s", lines[1])
    assert ("s ahead of this machine" in lines[0]) == (holder["at_s"] > time.time() + 1800)


@pytest.mark.parametrize("skew_s", [-3600, 0, 3600])
def test_a_living_driver_is_noticed_whatever_its_clock_says(quick: None, tmp_path: Path, skew_s: float) -> None:
    holder = write_holder(tmp_path, at_s=time.time() + skew_s)
    renewed = json.dumps({**holder, "at_s": holder["at_s"] + 0.1})
    timer = threading.Timer(0.1, lambda: (tmp_path / "driver.json").write_text(renewed))
    timer.start()
    with pytest.raises(LeaseError, match=r"process 1 on elsewhere.*renewed its lease"), Lease(str(tmp_path)):
        pass
    timer.join()
    assert (tmp_path / "driver.json").read_text() == renewed


def test_a_lease_that_is_released_meanwhile_is_taken_at_once(tmp_path: Path) -> None:
    write_holder(tmp_path)
    timer = threading.Timer(0.1, (tmp_path / "driver.json").unlink)
    timer.start()
    started_s = time.monotonic()
    with Lease(str(tmp_path)):
        assert time.monotonic() - started_s < STALE_S / 2


@pytest.mark.parametrize("content", ["", '{"token": "x', "[]", '{"token": "x"}', "\x00"])
def test_a_damaged_lease_is_named_and_replaced(
    quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "driver.json").write_text(content)
    with Lease(str(tmp_path)) as ours:
        ours.check()
        (tmp_path / "driver.json").write_text(content)
        with pytest.raises(LeaseLost, match=r"driver\.json was removed or damaged"):
            ours.check()
    assert "driver.json is empty or damaged" in caplog.text


def test_a_living_driver_renews_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    file = tmp_path / "driver.json"
    with Lease(str(tmp_path)):
        first = json.loads(file.read_text())["at_s"]
        deadline_s = time.monotonic() + 60
        while json.loads(file.read_text())["at_s"] == first:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
