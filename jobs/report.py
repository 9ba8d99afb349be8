"""`python -m jobs.report OUTPUT`: one HTML file to look at what a run gave: counts, distributions, pictures.

The file needs nothing else: it opens from disk, loads nothing and sends nothing. Exit code 0: written; 2: bad usage;
1: failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs.cli import run_job
from pipelines.report.build import MAX_ROWS, ReportOptions, write_report


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.report") -> int:
    options = _parse(argv, prog)
    return run_job(lambda: write_report(options), goes_on=False)


def _parse(argv: Sequence[str] | None, prog: str) -> ReportOptions:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", metavar="OUTPUT", help="of a run, finished or not")
    parser.add_argument("--to", metavar="FILE", help="default OUTPUT/report.html; NAME-report.html here for a URI")
    parser.add_argument("--rows", type=int, default=300, help=f"most rows to show, at most {MAX_ROWS} (default 300)")
    parser.add_argument(
        "--truth",
        action="append",
        default=[],
        metavar="TASK=COLUMN",
        help="a kept column that holds what is right: adds the share right and calibration; may be repeated",
    )
    parser.add_argument(
        "--media-limit-s", type=float, default=600, help="for reading media; later rows lack theirs (default 600)"
    )
    parser.add_argument(
        "--allow-private-addresses", action="store_true", help="read http(s) URLs of hosts inside your own network too"
    )
    given = vars(parser.parse_args(argv))
    if not 0 <= given["rows"] <= MAX_ROWS:
        parser.error(f"--rows must be within 0 and {MAX_ROWS}")
    pairs = [pair.partition("=") for pair in given.pop("truth")]
    if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
        parser.error(f"--truth {wrong[0]!r} is not TASK=COLUMN")
    return ReportOptions(**given, truths={task: column for task, _, column in pairs})


if __name__ == "__main__":
    sys.exit(main())
