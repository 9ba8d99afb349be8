"""The job `ovis2 caption INPUT OUTPUT --model MODEL`: one text about each image or video, in Parquet."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import RUN_NOTES, run_rows
from jobs.command_line import Command
from pipelines.config import CaptionConfig

COMMAND = Command(
    "caption",
    CaptionConfig,
    "Write a text about each image or video into Parquet: a caption, or the answer to a question.",
    "INPUT OUTPUT --model MODEL",
    (
        "photos captions --model demo",
        "'s3://bucket/shards/*.tar' s3://bucket/captions --model AIDC-AI/Ovis2-8B --prompt-column txt",
        "talks answers --model AIDC-AI/Ovis2-1B --prompt 'Who is speaking?' --num-frames 24",
    ),
    RUN_NOTES,
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.caption") -> int:
    """Run the job -> its exit code."""
    return run_rows(COMMAND, argv, prog)


if __name__ == "__main__":
    sys.exit(main())
