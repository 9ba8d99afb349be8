"""`python -m jobs.compact OUTPUT`: rewrite the files of a run as few large ones, sorted by row.

A run writes what is finished at least every half minute, so a long one leaves many files. No row is lost whenever this
is killed: the same command goes on, and so does the run. Exit code 0: done; 2: bad usage; 1: failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs.cli import run_job
from pipelines.output.compact import compact_run


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.compact") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", metavar="OUTPUT", help="of a run, finished or not, that is not going on now")
    parser.add_argument("--file-size-mb", type=float, default=256, help="of a new file, about (default 256)")
    arguments = parser.parse_args(argv)
    if not arguments.file_size_mb > 0:
        parser.error("--file-size-mb must be positive")
    return run_job(lambda: compact_run(arguments.output, round(arguments.file_size_mb * 2**20)))


if __name__ == "__main__":
    sys.exit(main())
