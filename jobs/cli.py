"""Run a job for the shell: exit codes, one JSON line on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TypeVar

from jobs.options import parse_command_line
from pipelines.config import RunConfig
from pipelines.errors import EverythingFails, LeaseLost, RowsLost, StageFailed, StoreFault
from pipelines.pipeline import run_pipeline

OK, FAILED, BAD_USAGE, TOO_MANY_ERRORS = 0, 1, 2, 3

Report = TypeVar("Report")


def run_job(
    job: Callable[[], Report], exit_code: Callable[[Report], int] = lambda _: OK, *, goes_on: bool = True
) -> int:
    """Run `job` and print the dataclass that it returns -> the exit code, of a job that ends by `exit_code`.

    `goes_on` says whether the same command goes on with what an interrupted one has done.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # `ray job stop` terminates: leave as on Ctrl-C, so that finished rows are written and actors ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _stdout_to_stderr():
            report = job()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE
    except (StageFailed, EverythingFails) as error:
        cause = f"{error.__cause__}\n\n" if isinstance(error, StageFailed) else ""
        message = f"{cause}error: {error}"
    except (OSError, StoreFault, RowsLost, LeaseLost) as error:
        advice = ". What is finished is kept: the same command, without --overwrite, goes on" if goes_on else ""
        message = f"error: {error}{advice}"
    except KeyboardInterrupt:
        advice = "; the same command, without --overwrite, goes on from here" if goes_on else ""
        message = f"stopped{advice}"
    else:
        print(json.dumps(asdict(report), ensure_ascii=False))  # type: ignore[call-overload]
        return exit_code(report)
    print(message, file=sys.stderr)
    return FAILED


def run_rows(kind: type[RunConfig], prog: str, description: str, argv: Sequence[str] | None) -> int:
    """Run the job over rows that the command line describes -> its exit code."""
    config = parse_command_line(kind, prog, description, argv)
    max_rate = config.max_error_rate
    return run_job(lambda: run_pipeline(config), lambda run: TOO_MANY_ERRORS if run.error > max_rate * run.rows else OK)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """For this process and those that it starts: Ray forwards what workers print to the driver's stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
