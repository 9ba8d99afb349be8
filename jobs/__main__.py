"""The command `ovis2 JOB ...`, also `python -m jobs JOB ...`: list the jobs, or run one of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from pipelines import __version__

JOBS = {
    "caption": "write a text about each image or video: a caption or the answer to a question",
    "annotate": "ask several questions about each image or video; each answer gets a typed column",
    "report": "write one HTML page about a run: counts, errors, distributions, a contact sheet",
    "compact": "merge the many Parquet files of a run into a few large ones",
    "demo": "caption drawn images with the bundled demo model and compare with the truth",
    "demo-answers": "annotate drawn images with the bundled demo model and write a report",
}


def main(argv: Sequence[str] | None = None, prog: str = "ovis2") -> int:
    """Run the job that the first argument names -> its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = _build_parser(prog).parse_args(arguments[:1]).job
    job = import_module(f"jobs.{name.replace('-', '_')}")  # only now, so that the list of jobs is quick
    return int(job.main(arguments[1:], f"{prog} {name}"))


def _build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} JOB [OPTIONS]",
        description="Caption and annotate images and videos with Ovis2 on Ray.",
        epilog="\n".join(["jobs:", *(f"  {name:14}{line}" for name, line in JOBS.items()), "", f"{prog} JOB --help"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("job", type=_check_job, metavar="JOB", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"ovis2-ray {__version__}")
    return parser


def _check_job(name: str) -> str:
    if name in JOBS:
        return name
    close = get_close_matches(name, JOBS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"use {', '.join(JOBS)}"
    raise argparse.ArgumentTypeError(f"unknown job {name!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main(prog="python -m jobs"))
