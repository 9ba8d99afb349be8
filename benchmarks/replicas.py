"""Measure rows per second by number of replicas, and the driver's cost per row, with an engine that only sleeps.

    python -m benchmarks.replicas

A replica takes `--ms-per-row` per row, so its ideal rate is 1000 / that number per second. Rows are questions without
images, which cost little to prepare. What is missing from the ideal rate is spent in Ray, the stages and the driver.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import ray

from pipelines.config import CaptionConfig
from pipelines.pipeline import run_pipeline
from tests.support.fake_engine import FakeEngineFactory
from tests.support.golden_data import checkpoint_dir


def main() -> None:
    args = _parse()
    ray.init(address="local", num_cpus=16, num_gpus=max(args.replicas), include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as directory:
        results = [_measure_replicas(Path(directory), replicas, args) for replicas in args.replicas]
    ray.shutdown()
    print(json.dumps(results))


def _measure_replicas(directory: Path, replicas: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the rates of the time in which replicas worked; starting the pools is excluded."""
    rows = args.rows_per_replica * replicas
    questions, log = directory / f"{replicas}.jsonl", directory / f"{replicas}.log"
    questions.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(rows)))
    config = CaptionConfig(
        input=(str(questions),),
        output=str(directory / str(replicas)),
        model=str(checkpoint_dir("tiny56-tied")),
        prompt_column="prompt",
        image_column="",
        device="cuda",
        num_replicas=replicas,
        num_preprocessors=args.preprocessors,
    )
    cpu_s = time.process_time()
    summary = run_pipeline(config, make_engine=FakeEngineFactory(seconds_per_row=args.ms_per_row / 1000, busy_log=log))
    cpu_s = time.process_time() - cpu_s
    assert summary.ok == rows, summary
    calls = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
    window_s = max(stop for _, stop, _ in calls) - min(start for start, _, _ in calls)
    result = {
        "replicas": replicas,
        "rows": rows,
        "rows_per_s": round(rows / window_s, 1),
        "share_of_ideal": round(rows / window_s / (1000 / args.ms_per_row * replicas), 3),
        "driver_cpu_ms_per_row": round(1000 * cpu_s / rows, 3),
        "driver_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(result, flush=True)
    return result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows-per-replica", type=int, default=2000)
    parser.add_argument("--ms-per-row", type=float, default=10.0)
    parser.add_argument("--preprocessors", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
