"""The job `ovis2 annotate INPUT OUTPUT --tasks FILE --model MODEL`: several questions per row, with typed answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import RUN_NOTES, run_rows
from jobs.command_line import Command
from pipelines.config import AnnotateConfig

COMMAND = Command(
    "annotate",
    AnnotateConfig,
    "Ask several questions about each image or video; each answer gets a typed column in Parquet.",
    "INPUT OUTPUT --tasks FILE --model MODEL",
    (
        "photos answers --tasks tasks.yaml --model demo",
        "videos.jsonl answers --tasks tasks.yaml --model AIDC-AI/Ovis2-8B --regenerate flagged --keep-columns title",
    ),
    RUN_NOTES,
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.annotate") -> int:
    """Run the job -> its exit code."""
    return run_rows(COMMAND, argv, prog)


if __name__ == "__main__":
    sys.exit(main())
