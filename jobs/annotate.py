"""`python -m jobs.annotate INPUT OUTPUT --tasks tasks.yaml --model MODEL`: named questions, typed answers in Parquet.

All options and exit codes of `jobs.caption`, but for the prompt: docs/annotate.md.
"""

from __future__ import annotations

import sys

from jobs.cli import run_rows
from jobs.command_line import parse_command_line
from pipelines.config import AnnotateConfig


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    description = "Ask Ovis2 several questions about each image or video, with typed answers, into Parquet."
    return run_rows(parse_command_line(AnnotateConfig, "python -m jobs.annotate", description, arguments))


if __name__ == "__main__":
    sys.exit(main())
