"""The job `ovis2 list INPUT OUTPUT ...`: list the rows of a run beforehand, for drivers with --shard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.cli import run_job
from jobs.command_line import Command, parse_command_line
from jobs.plan import asks_tasks
from pipelines.config import AnnotateConfig, CaptionConfig, RunConfig

_TEXT = "List the rows of INPUT once into OUTPUT/list, for drivers that then each do a part: --shard I/N."
_NOTES = "Give the options of the runs that follow; those of annotate with --tasks FILE."
_EXAMPLES = ("s3://bucket/inventory.parquet s3://bucket/captions --model AIDC-AI/Ovis2-8B",)
COMMAND = Command("list", CaptionConfig, _TEXT, "INPUT OUTPUT --model MODEL", _EXAMPLES, _NOTES)
ANNOTATE = Command("list", AnnotateConfig, _TEXT, "INPUT OUTPUT --model MODEL --tasks FILE", _EXAMPLES, _NOTES)


@dataclass(frozen=True)
class Listed:
    """The number of rows and where they are."""

    rows: int
    list: str


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.list") -> int:
    """Run the job -> its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    command: Command[Any] = ANNOTATE if asks_tasks(given) else COMMAND
    config = parse_command_line(command, given, prog)
    return run_job(lambda: _list(config))


def _list(config: RunConfig) -> Listed:
    from pipelines.row_lists import list_beforehand
    from pipelines.storage.preflight import check_stores

    check_stores((*config.input, config.output))
    found = list_beforehand(config)
    return Listed(found.num_rows, found.place)


if __name__ == "__main__":
    sys.exit(main())
