"""Let two jobs compete for the one GPU of a cluster: the second says what it waits for, and both finish.

    python -m tests.stress.compete [--rows 60] [--seconds-per-row 0.4]

The GPU and the engine are fake, everything else is real. Prints what the waiting job logged and JSON as its last line;
the exit code is 1 if a job fails, a row is lost, or nothing was said.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from pipelines.output.sink import read_results
from tests.support.clusters import Driver, start_gpu_cluster
from tests.support.golden_data import checkpoint_dir
from tests.support.pictures import write_demo_pictures

_TIMEOUT_S = 280


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.compete", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seconds-per-row", type=float, default=0.4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, start_gpu_cluster(head={"num_cpus": 4, "num_gpus": 1}) as cluster:
        pictures = Path(place) / "pictures"
        pictures.mkdir()
        write_demo_pictures(pictures, args.rows)
        outputs = [Path(place) / name for name in ("first", "second")]
        options = {"model": str(checkpoint_dir("tiny56-tied")), "max_new_tokens": 4, "num_preprocessors": 1}
        drivers = [
            Driver(cluster, pictures, output, seconds_per_row=args.seconds_per_row, **options) for output in outputs
        ]
        ended = [driver.finish(_TIMEOUT_S) for driver in drivers]
        statuses = [read_results(str(output)).column("status").to_pylist() for output in outputs]
    said = [line for _, _, err in ended for line in err.splitlines() if line.startswith("waiting for ")]
    print(*said, sep="\n")
    exit_codes, num_ok = [code for code, _, _ in ended], [rows.count("ok") for rows in statuses]
    print(json.dumps({"exit_codes": exit_codes, "ok": num_ok, "lines": len(said)}))
    is_explained = any("another job holds" in line for line in said)
    return int(exit_codes != [0, 0] or num_ok != [args.rows] * 2 or not is_explained)


if __name__ == "__main__":
    sys.exit(main())
