"""The job `ovis2 export OUTPUT TARGET`: write chosen rows of a run in the format of another tool, with their media."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import PositiveInt, field_validator

from jobs.cli import run_job
from jobs.command_line import Command, parse_command_line
from pipelines.config import Location, Section, declare_option
from pipelines.export.options import ExportOptions, FormatName
from pipelines.export.run import export_run
from pipelines.storage import store


class ExportFlags(Section):
    """The options of the job."""

    title = "export"

    output: Location = declare_option(..., description="directory or URI of a run")
    target: Location = declare_option(..., description="directory or URI to write, which is empty or a stopped export")
    format: FormatName = declare_option("jsonl", description="format to write")
    where: str | None = declare_option(
        None,
        description="SQL expression over the columns; only rows for which it is true (needs DuckDB)",
        unset="all rows",
    )
    status: Literal["ok", "error", "all"] = declare_option("ok", description="only rows with this status")
    without_flags: bool = declare_option(False, description="only rows without flags")
    min_confidence: tuple[Annotated[str, "TASK=P"], ...] = declare_option(
        (), description="only rows whose answer to the task is at least this probable, from 0 to 1", unset="none"
    )
    text: str | None = declare_option(
        None, description="task whose answer is the caption", unset="the first task with free text"
    )
    corrected: bool = declare_option(False, description="take the answers that people corrected (`ovis2 review`)")
    media: bool = declare_option(True, description="copy images and videos")
    rows_per_file: PositiveInt = declare_option(1000, description="maximum number of rows per file or folder")
    file_size_mb: float = declare_option(512.0, gt=0, description="approximate maximum size of a file, in MiB")
    allow_private_addresses: bool = declare_option(
        False, description="also read http(s) URLs of hosts inside your own network"
    )
    overwrite: bool = declare_option(False, description="remove what TARGET holds")

    @field_validator("min_confidence")
    @classmethod
    def _check_pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        for pair in pairs:
            task, _, number = pair.partition("=")
            if not task or not number.replace(".", "", 1).isdecimal():
                raise ValueError(f"{pair!r} is not TASK=P")
        return pairs


COMMAND = Command(
    "export",
    ExportFlags,
    "Write chosen rows of a run as WebDataset, Hugging Face dataset, LLaVA, COCO captions, CSV or JSON lines.",
    "OUTPUT TARGET",
    (
        "captions shards --format webdataset",
        'answers dataset --format hf --where "is_outdoors and people > 3" --without-flags',
        "answers rows --format csv --no-media --min-confidence season=0.8",
    ),
    places=("output", "target"),
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.export") -> int:
    """Run the job -> its exit code."""
    given = parse_command_line(COMMAND, argv, prog).model_dump()
    store.allow_private_addresses(given.pop("allow_private_addresses"))
    pairs = [pair.partition("=") for pair in given.pop("min_confidence")]
    confidences = {task: float(number) for task, _, number in pairs}
    given |= {name: store.make_absolute(given[name]) for name in ("output", "target")}
    given |= {name: given[name] or "" for name in ("where", "text")}
    options = ExportOptions(**{**given, "min_confidence": confidences})
    return run_job(lambda: export_run(options))


if __name__ == "__main__":
    sys.exit(main())
