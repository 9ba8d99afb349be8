"""`python -m jobs.caption INPUT OUTPUT --model MODEL`: caption images into Parquet.

Exit code 0: all rows written; 3: written, but more error rows than --max-error-rate; 2: bad usage; 1: failed, and the
same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import run_rows
from pipelines.config import CaptionConfig


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.caption") -> int:
    description = "Caption images and videos with Ovis2 into Parquet."
    return run_rows(CaptionConfig, prog, description, argv)


if __name__ == "__main__":
    sys.exit(main())
