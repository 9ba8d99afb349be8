"""Run a review until the user stops it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from pipelines.errors import RunError
from pipelines.export.selection import list_data_files, read_output_columns
from pipelines.output.run_record import read_record
from pipelines.review.picks import Pick, pick_answers
from pipelines.review.server import Review, ReviewServer
from pipelines.storage import store
from pipelines.storage.preflight import check_stores


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
    output = store.make_absolute(output)
    check_stores([output])
    record = read_record(output)
    if record is None:
        raise RunError(f"{output} holds no run (no run.json)")
    columns = read_output_columns(record, list_data_files(output)[0][0])
    answers = pick_answers(output, columns, tasks, pick, by, max_answers)
    return ReviewServer(Review(output, answers), port)


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
