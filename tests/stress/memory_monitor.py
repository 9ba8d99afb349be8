"""Let Ray's memory monitor kill the replica of a job: the log names node and figures, and no row is blamed.

    python -m tests.stress.memory_monitor [--hog-gb 3] [--rows 20]

The engine is a fake one whose first call takes memory until its process is killed; Ray's threshold is set to what the
machine uses at the start and half as much as the engine takes. Other processes of the machine count too, so it should
be quiet. Prints the lines about deaths and JSON as its last line; the exit code is 1 if a row is lost or blamed, or the
cause was not named.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.cli import run_job
from ovis_model.types import Completion, Request, SamplingParams
from pipelines.config import CaptionConfig
from pipelines.generate import Replica
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline
from tests.support.fake_engine import FakeEngine, FakeEngineFactory
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import encode_picture
from tests.support.processes import Job

_NAMED = re.compile(r"Ray killed \d+ replicas? because node \S+ is low on memory \([\d.]+ ?GB of [\d.]+ ?GB\)")


@dataclass(frozen=True)
class HungryFactory(FakeEngineFactory):
    """Makes fake engines of which the first takes `num_bytes` of memory; `marker` says that it has begun."""

    marker: Path = Path("marker")
    num_bytes: int = 0

    def __call__(self, replica: Replica) -> FakeEngine:
        return HungryEngine(self)


class HungryEngine(FakeEngine):
    def __init__(self, factory: HungryFactory) -> None:
        super().__init__(factory)
        self._hungry = factory

    def generate(
        self, requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        if not self._hungry.marker.exists():
            self._hungry.marker.touch()
            taken = np.ones(self._hungry.num_bytes, np.uint8)
            time.sleep(60)  # to be killed in
            del taken
        return super().generate(requests, params)


def compute_threshold(hog_bytes: int) -> float:
    """Return the share of the memory in use at which Ray should kill."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    used_kib = kib["MemTotal"] - kib["MemAvailable"]
    return (used_kib + (1 << 20) + hog_bytes / 2 / 1024) / kib["MemTotal"]  # Ray and the actors take 1 GiB


def _run(pictures: str, output: str, hog_gb: str) -> int:
    config = CaptionConfig(input=(pictures,), output=output, model=str(checkpoint_dir("tiny56-tied")))
    engine = HungryFactory(marker=Path(output).with_name("marker"), num_bytes=int(float(hog_gb) * 2**30))
    return run_job(lambda: run_pipeline(config, make_engine=engine))


def main() -> int:
    name = "python -m tests.stress.memory_monitor"
    parser = argparse.ArgumentParser(prog=name, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hog-gb", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # the process whose replica is killed
    args = parser.parse_args()
    if args.run:
        return _run(*args.run)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "pictures").mkdir()
        for number in range(args.rows):
            (place / "pictures" / f"{number:04}.png").write_bytes(encode_picture(number))
        command = [
            "tests.stress.memory_monitor",
            "--run",
            str(place / "pictures"),
            str(place / "out"),
            str(args.hog_gb),
        ]
        threshold = compute_threshold(int(args.hog_gb * 2**30))
        settings = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
        job = Job(command, environment=settings).start()
        finished = job.finish(280)
        job.wait_until_all_gone()
        statuses = read_results(str(place / "out")).column("status").to_pylist()
    lines = [line for line in finished.stderr.splitlines() if "low on memory" in line]
    print(*lines, sep="\n")
    is_named = any(map(_NAMED.search, lines))
    result = {"exit_code": finished.exit_code, "ok": statuses.count("ok"), "is_named": is_named}
    print(json.dumps({**result, "threshold": round(threshold, 4)}))
    if finished.exit_code:
        print(finished.stderr, file=sys.stderr)
    return int(result != {"exit_code": 0, "ok": args.rows, "is_named": True})


if __name__ == "__main__":
    sys.exit(main())
