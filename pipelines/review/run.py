"""Run a review until the user stops it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from pipelines.report.opened import open_output
from pipelines.review.picks import Pick, pick_answers
from pipelines.review.server import Review, ReviewServer


@dataclass(frozen=True)
class Reviewed:
    """Counts of a review: answers picked, and those with a decision."""

    picked: int
    decided: int
    output: str


def start_review(
    output: str, *, tasks: tuple[str, ...], pick: Pick, by: str | None, max_answers: int, port: int
) -> ReviewServer:
    """Pick the answers and return a server that does not run yet. Raise RunError if OUTPUT holds no run."""
    run = open_output(output)
    return ReviewServer(Review(run, pick_answers(run, tasks, pick, by, max_answers)), port)


def serve_review(server: ReviewServer, output: str) -> Reviewed:
    """Serve the page until Ctrl-C, then return the counts."""
    print(f"review at {server.url}; Ctrl-C ends it, and every decision is kept at once", file=sys.stderr, flush=True)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return Reviewed(len(server.review.describe()), server.review.num_decided, output)
