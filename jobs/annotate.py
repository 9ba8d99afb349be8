"""`python -m jobs.annotate INPUT OUTPUT --tasks tasks.yaml --model MODEL`: named questions, typed answers in Parquet.

All options and exit codes of `jobs.caption`, but for the prompt: docs/annotate.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import run_rows
from pipelines.config import AnnotateConfig


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.annotate") -> int:
    description = "Ask Ovis2 several questions about each image or video, with typed answers, into Parquet."
    return run_rows(AnnotateConfig, prog, description, argv)


if __name__ == "__main__":
    sys.exit(main())
