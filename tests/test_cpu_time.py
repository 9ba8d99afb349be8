"""CPU time of benchmarks includes the processes that they start."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.cpu_time import measure_cpu_s

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"


def test_the_time_of_children_counts() -> None:
    before_s, own_s = measure_cpu_s(), time.process_time()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        spent_s = measure_cpu_s() - before_s
        own_s = time.process_time() - own_s
        child.stdin.close()
    assert 0.29 <= spent_s - own_s <= 0.6
