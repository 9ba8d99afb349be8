"""Report usage errors in one plain line each, and lay out --help. Imports little, so that `ovis2 --help` is quick."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, TypeAlias

Advise: TypeAlias = Callable[[str], str]

BAD_USAGE = 2
_MAX_WIDTH, _MAX_FLAG_WIDTH = 110, 32
_NO_VALUE = re.compile(r"argument (\S+): expected ")
_UNKNOWN = re.compile(r"unrecognized arguments: (\S+)")
_SWITCH_VALUE = re.compile(r"argument (\S+): ignored explicit argument (.*)")


class Parser(argparse.ArgumentParser):
    """A parser that reports each usage error in one line and exits with 2.

    advise: name of an unknown option -> what to do in its place, "" if that is not known.
    """

    def __init__(self, *, advise: Advise = lambda _: "", **options: Any) -> None:
        super().__init__(**options)
        self._advise = advise

    def fail(self, lines: Sequence[str]) -> NoReturn:
        """Print the errors and where to find help, and exit."""
        for line in lines:
            print("error:", re.sub(r"\s*\n\s*", " ", line), file=sys.stderr)
        print(f"See {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_USAGE)

    def error(self, message: str) -> NoReturn:
        """Report an error of argparse in our words."""
        if match := _NO_VALUE.match(message):
            flag = match[1]
            self.fail([f'{flag} needs a value; write {flag}=VALUE if the value begins with "-"'])
        if match := _SWITCH_VALUE.match(message):
            self.fail([f"{match[1].split('/')[0]} takes no value; got {match[2]}"])
        if match := _UNKNOWN.match(message):
            self.fail([self.describe_unknown(match[1])])
        self.fail([message])

    def describe_unknown(self, argument: str) -> str:
        """Return the line about a flag that does not exist."""
        flag = argument.partition("=")[0]
        return f"{flag} is not an option{describe_other(flag, self._option_string_actions, self._advise)}"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of an epilog, and breaks no line inside an option or a path."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns - 2, _MAX_WIDTH)
        super().__init__(prog, max_help_position=_MAX_FLAG_WIDTH, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def describe_other(name: str, known: Iterable[str], advise: Advise) -> str:
    """Return "; " and the advice about an unknown name, or else the known name that is most similar, or ""."""
    advice = advise(name)
    return f"; {advice}" if advice else suggest(name, known)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name that is most similar, or ""."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
