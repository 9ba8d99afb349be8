"""One driver per OUTPUT: a living driver keeps others out, a dead one is replaced."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

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


def test_a_driver_on_another_host_is_replaced_once_it_is_silent(tmp_path: Path) -> None:
    file = tmp_path / "driver.json"
    with Lease(str(tmp_path)):
        holder = {**json.loads(file.read_text()), "host": "elsewhere", "pid": 1}
    file.write_text(json.dumps(holder))
    with pytest.raises(LeaseError, match="on elsewhere"), Lease(str(tmp_path)):
        pass
    file.write_text(json.dumps({**holder, "at_s": time.time() - STALE_S - 1}))
    with Lease(str(tmp_path)):
        pass


def test_a_living_driver_renews_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    file = tmp_path / "driver.json"
    with Lease(str(tmp_path)):
        first = json.loads(file.read_text())["at_s"]
        deadline_s = time.monotonic() + 60
        while json.loads(file.read_text())["at_s"] == first:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
