"""`python -m jobs.caption INPUT OUTPUT --model MODEL`: caption images into Parquet.

Exit code 0: all rows written; 3: written, but more error rows than --max-error-rate; 2: bad usage; 1: failed, and the
same command goes on where it stopped.
"""

from __future__ import annotations

import sys

from jobs.cli import OK, TOO_MANY_ERRORS, run_job
from pipelines.caption import Summary, caption
from pipelines.config import parse_command_line


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    config = parse_command_line("python -m jobs.caption", "Caption images with Ovis2 into Parquet.", arguments)

    def exit_code(summary: Summary) -> int:
        return TOO_MANY_ERRORS if summary.error > config.max_error_rate * summary.rows else OK

    return run_job(lambda: caption(config), exit_code)


if __name__ == "__main__":
    sys.exit(main())
