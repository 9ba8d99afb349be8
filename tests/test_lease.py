"""One driver an OUTPUT: a living one keeps others out, a dead one does not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.lease import STALE_S, Lease, LeaseError, LeaseLost


def test_a_second_driver_is_told_who_has_it(tmp_path: Path) -> None:
    first, second = Lease(str(tmp_path)), Lease(str(tmp_path))
    first.take()
    with pytest.raises(LeaseError, match=r"another run writes here: process \d+"):
        second.take()
    first.release()
    second.take()
    second.check()
    with pytest.raises(LeaseLost):
        first.check()
    first.release()  # does not take away what is another's
    second.check()


def test_a_dead_driver_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    script = f"from pipelines.lease import Lease; Lease({str(tmp_path)!r}).take()"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "driver.json").exists()
    Lease(str(tmp_path)).take()


def test_a_driver_elsewhere_is_replaced_when_it_is_silent(tmp_path: Path) -> None:
    Lease(str(tmp_path)).take()
    file = tmp_path / "driver.json"
    holder = {**json.loads(file.read_text()), "host": "elsewhere", "pid": 1}
    file.write_text(json.dumps(holder))
    with pytest.raises(LeaseError, match="on elsewhere"):
        Lease(str(tmp_path)).take()
    file.write_text(json.dumps({**holder, "at_s": time.time() - STALE_S - 1}))
    Lease(str(tmp_path)).take()
