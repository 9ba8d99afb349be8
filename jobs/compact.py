"""The job `ovis2 compact OUTPUT`: rewrite the files of a run as few large files, sorted by row.

A run writes its finished rows at least every half minute, so a long run leaves many files. The job may be killed at any
time: no row is lost, and both the job and the run can be resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import run_job
from jobs.command_line import Command, parse_command_line
from pipelines.config import Location, Section, declare_option
from pipelines.output.compact import compact_run


class CompactOptions(Section):
    """The options of the job."""

    title = "output"

    output: Location = declare_option(..., description="directory or URI of a run that is finished or stopped")
    file_size_mb: float = declare_option(256.0, gt=0, description="approximate size of a new file, in MiB")


COMMAND = Command(
    "compact",
    CompactOptions,
    "Merge the many Parquet files of a run into a few large ones, sorted by row. Killing it loses no row.",
    "OUTPUT",
    ("captions", "s3://bucket/captions --file-size-mb 512"),
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.compact") -> int:
    """Run the job -> its exit code."""
    options = parse_command_line(COMMAND, argv, prog)
    return run_job(lambda: compact_run(options.output, round(options.file_size_mb * 2**20)))


if __name__ == "__main__":
    sys.exit(main())
