"""The job `ovis2 review OUTPUT`: accept or correct answers of a run in a page on this machine, by keyboard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from pydantic import PositiveInt

from jobs.cli import run_job
from jobs.command_line import Command, parse_command_line
from pipelines.config import Location, Section, declare_option
from pipelines.review.picks import Pick
from pipelines.review.run import serve_review, start_review
from pipelines.storage import store


class ReviewFlags(Section):
    """The options of the job."""

    title = "review"

    output: Location = declare_option(..., description="directory or URI of a run")
    task: tuple[Annotated[str, "TASK"], ...] = declare_option((), description="tasks to review", unset="all tasks")
    pick: Pick = declare_option("random", description="which answers to show first")
    by: Annotated[str, "COLUMN"] | None = declare_option(
        None, description="column whose values get the same number of answers each", unset="no column"
    )
    answers: PositiveInt = declare_option(100, description="maximum number of answers")
    port: int = declare_option(0, ge=0, le=65535, description="port of the page on this machine; 0 takes a free one")
    allow_private_addresses: bool = declare_option(
        False, description="also read http(s) URLs of hosts inside your own network"
    )


COMMAND = Command(
    "review",
    ReviewFlags,
    "Accept or correct answers of a run in a page on this machine; decisions are kept in OUTPUT/review.",
    "OUTPUT",
    ("answers", "answers --pick uncertain --task season --answers 50", "answers --by country"),
    places=("output",),
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.review") -> int:
    """Run the job -> its exit code."""
    given = parse_command_line(COMMAND, argv, prog)
    store.allow_private_addresses(given.allow_private_addresses)

    def review() -> object:
        server = start_review(
            given.output,
            tasks=given.task,
            pick=given.pick,
            by=given.by,
            max_answers=given.answers,
            port=given.port,
        )
        return serve_review(server, store.make_absolute(given.output))

    return run_job(review, is_resumable=False)


if __name__ == "__main__":
    sys.exit(main())
