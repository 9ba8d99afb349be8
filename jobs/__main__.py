"""The command `ovis2 JOB ...`, also `python -m jobs JOB ...`: list the jobs, or run one of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from jobs import JOBS
from jobs.shell import prepare_process
from jobs.usage import HelpFormatter, Parser, suggest
from pipelines import __version__

_NEXT = """\
examples:
  {prog} caption --help                         all options of a job; also docs/options.md
  {prog} caption photos captions --model demo   caption a directory with the bundled model"""


def main(argv: Sequence[str] | None = None, prog: str = "ovis2") -> int:
    """Run the job that the first argument names -> its exit code."""
    if argv is None:  # this process does nothing else
        prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _build_parser(prog)
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments[:1])
        parser.fail([f"JOB is missing; use {', '.join(JOBS)}"])
    name, *others = arguments
    if name not in JOBS:
        parser.fail([f"{name!r} is not a job{suggest(name, JOBS) or '; use ' + ', '.join(JOBS)}"])
    job = import_module(f"jobs.{name.replace('-', '_')}")  # only now, so that the list of jobs is quick
    return int(job.main(others, f"{prog} {name}"))


def _build_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} JOB [OPTIONS]",
        description="Caption and annotate images and videos with Ovis2 on Ray.",
        epilog="\n".join(
            ["jobs:", *(f"  {name:14}{line}" for name, line in JOBS.items()), "", _NEXT.format(prog=prog)]
        ),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    options = parser.add_argument_group("options")
    options.add_argument("-h", "--help", action="help", help="show this help and exit")
    options.add_argument("--version", action="version", version=f"ovis2-ray {__version__}", help="show the version")
    return parser


if __name__ == "__main__":
    sys.exit(main(prog="python -m jobs"))
