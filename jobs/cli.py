"""Run a job for the shell: one JSON line on stdout, everything else on stderr, and one of EXIT_CODES."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from jobs.command_line import Command, parse_command_line
from jobs.shell.library_log import LibraryLog, divert_libraries
from jobs.shell.signals import drain_when_signalled, leave_with, runs_alone
from jobs.shell.streams import print_last_line
from jobs.usage import BAD_USAGE
from pipelines.config import RunConfig
from pipelines.errors import (
    ClusterChanged,
    EngineNotStarted,
    EverythingFails,
    LeaseLost,
    LibraryError,
    NodeIncomplete,
    ProcessesDie,
    RayNotStarted,
    RowsLost,
    StageFailed,
    StoreFault,
)

OK, FAILED, TOO_MANY_ERRORS = 0, 1, 3
EXIT_CODES = {
    OK: "every row is written",
    FAILED: "the run failed or was stopped; the same command without --overwrite resumes it",
    BAD_USAGE: "wrong usage; the message says what to change, and nothing was started",
    TOO_MANY_ERRORS: "every row is written, but more than --max-error-rate of them are errors",
}
RUN_NOTES = "\n".join(["exit codes:", *(f"  {code}  {meaning}" for code, meaning in EXIT_CODES.items())])

_OUR_PACKAGES = ("__main__", "jobs", "demo", "pipelines", "ovis_model")

Config = TypeVar("Config", bound=RunConfig)
Report = TypeVar("Report")


def run_job(
    job: Callable[[], Report], exit_code: Callable[[Report], int] = lambda _: OK, *, is_resumable: bool = True
) -> int:
    """Run `job` and print the dataclass that it returns -> `exit_code` of the dataclass, or the exit code of an error.

    `is_resumable`: the same command continues what an interrupted one has done.
    """
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # prints the trace of each exception that it raises
    is_whole_process = runs_alone()
    with divert_libraries(_OUR_PACKAGES) if is_whole_process else nullcontext(LibraryLog()) as log:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        code = _run_and_report(job, exit_code, log, is_resumable=is_resumable)
    if is_whole_process:
        leave_with(code)
    return code


def _run_and_report(
    job: Callable[[], Report], exit_code: Callable[[Report], int], log: LibraryLog, *, is_resumable: bool
) -> int:
    try:
        # `ray job stop` terminates: leave as on Ctrl-C, so that finished rows are written and actors ended.
        with drain_when_signalled(), _stdout_to_stderr(), _translate_library_errors():
            report = job()
    except (ValueError, EngineNotStarted) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE
    except (StageFailed, EverythingFails) as error:
        cause = f"{error.__cause__}\n\n" if isinstance(error, StageFailed) else ""
        message = f"{cause}error: {error}"
    except (
        OSError,
        StoreFault,
        RowsLost,
        LeaseLost,
        ProcessesDie,
        NodeIncomplete,
        ClusterChanged,
        RayNotStarted,
        LibraryError,
    ) as error:
        message = f"error: {error}{_advise(error) if is_resumable else ''}"
    except KeyboardInterrupt as interrupt:
        message = f"stopped{_advise(interrupt) if is_resumable else ''}"
    else:
        print_last_line(report)
        return exit_code(report)
    if path := log.save():
        print(f"what libraries printed is in {path}", file=sys.stderr)
    print(message, file=sys.stderr)
    return FAILED


def run_rows(command: Command[Config], argv: Sequence[str] | None, prog: str) -> int:
    """Run the job over rows that the command line describes -> its exit code."""
    config = parse_command_line(command, argv, prog)
    from pipelines.pipeline import run_pipeline  # loads Ray, which --help and usage errors do without

    max_rate = config.max_error_rate
    return run_job(lambda: run_pipeline(config), lambda run: TOO_MANY_ERRORS if run.error > max_rate * run.rows else OK)


def _advise(error: BaseException) -> str:
    """Return what to do next: the note that the pipeline added to the exception, by default to resume."""
    resume = "Finished rows are saved; run the same command without --overwrite to resume"
    return f". {next(iter(getattr(error, '__notes__', ())), resume)}"


@contextmanager
def _translate_library_errors() -> Iterator[None]:
    """Raise LibraryError for an exception that a library defines; one of Python or of ours is unchanged."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package in (*sys.stdlib_module_names, *_OUR_PACKAGES):
            raise
        first_line = next(iter(str(error).strip().splitlines()), "no message")
        translated = LibraryError(f"{package}: {type(error).__name__}: {first_line}")
        translated.__notes__ = getattr(error, "__notes__", [])
        raise translated from error


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout of this process and its children: Ray forwards what workers print to the driver's stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
