"""The job `ovis2 report OUTPUT`: one HTML page about a run, with counts, distributions and some of its images.

The page needs nothing else: it opens from disk, loads nothing and sends nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from jobs.cli import run_job
from jobs.command_line import Command, parse_command_line
from pipelines.config import Location, Section, declare_option
from pipelines.evaluation.report import EvaluationPages, is_evaluation, write_evaluation_report
from pipelines.report.build import MAX_ROWS, Report, ReportOptions, write_report
from pipelines.report.compare import Compared, write_comparison
from pipelines.storage import store


class ReportFlags(Section):
    """The options of the job."""

    title = "report"

    output: Location = Field(description="directory or URI of a run, finished or not, or of an evaluation")
    other: Location | None = declare_option(
        None, description="another run over the same rows, to compare the answers with", unset="none"
    )
    to: Location | None = declare_option(
        None,
        description="HTML file to write",
        unset="OUTPUT/report.html; for a URI or two runs, a file in this directory",
    )
    rows: int = declare_option(300, ge=0, le=MAX_ROWS, description=f"maximum number of rows to show, up to {MAX_ROWS}")
    truth: tuple[Annotated[str, "TASK=COLUMN"], ...] = declare_option(
        (),
        description="kept column that holds the right answers of a task; adds accuracy and calibration; the task of "
        "a caption run is `text`",
        unset="none",
    )
    media_limit_s: float = declare_option(
        600.0, description="time limit for reading media, in seconds; later rows are shown without theirs"
    )
    allow_private_addresses: bool = declare_option(
        False, description="also read http(s) URLs of hosts inside your own network"
    )

    @field_validator("truth")
    @classmethod
    def _check_pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        for pair in pairs:
            if not all(pair.partition("=")):
                raise ValueError(f"{pair!r} is not TASK=COLUMN")
        return pairs


COMMAND = Command(
    "report",
    ReportFlags,
    "Write one HTML page about a run: counts, error reasons, distributions of the answers and a contact sheet.",
    "OUTPUT [OTHER]",
    (
        "captions",
        "answers-1b answers-8b --to comparison.html",
        "answers --truth colour=true_colour --rows 1000 --to review.html",
    ),
    places=("output",),
    optional_place="other",
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.report") -> int:
    """Run the job -> its exit code."""
    given = parse_command_line(COMMAND, argv, prog).model_dump()
    if other := given.pop("other"):
        store.allow_private_addresses(given["allow_private_addresses"])
        return run_job(lambda: _compare(given, other), is_resumable=False)
    pairs = [pair.partition("=") for pair in given.pop("truth")]
    options = ReportOptions(**given, truths={task: column for task, _, column in pairs})
    return run_job(lambda: _write(options), is_resumable=False)


def _compare(given: dict[str, Any], other: str) -> Compared:
    return write_comparison(given["output"], other, given["to"], max_rows=given["rows"], limit_s=given["media_limit_s"])


def _write(options: ReportOptions) -> Report | EvaluationPages:
    is_scored = is_evaluation(options.output)
    return write_evaluation_report(options) if is_scored else write_report(options)


if __name__ == "__main__":
    sys.exit(main())
