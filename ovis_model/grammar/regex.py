"""Check that a regular expression means the same to Python, ECMA-262 (JSON Schema) and Rust's `regex`.

Where the three disagree, an answer that fits for one is wrong for another: such constructs are refused by name.
"""

from __future__ import annotations

import re

MAX_PATTERN_CHARS = 10_000

# What may start or end a construct that is refused, read from left to right so that escapes hide what follows them.
_MARKS = re.compile(r"\\.|\[\^?\]?|\]|\(\?(?!:|P<)|&&|--|~~|\|\||[*+?}]\+|\{,", re.DOTALL)
_SAME_ESCAPES = frozenset("dswStnrfvxu")
_INSTEAD = {"D": "[^0-9]", "W": "[^A-Za-z0-9_]"}


def check_pattern(pattern: str) -> None:
    """Raise ValueError with the construct and its position if engines disagree about the pattern."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"a pattern of {len(pattern)} characters is over the limit of {MAX_PATTERN_CHARS}")
    in_class = ""
    for mark in _MARKS.finditer(pattern):
        if fault := _find_fault(mark[0], in_class):
            raise ValueError(f"pattern {shorten(pattern)}: {fault} at position {mark.start()}")
        if mark[0][0] in "[]":
            in_class = mark[0] if mark[0] != "]" else ""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern {shorten(pattern)}: {error}") from None


def shorten(text: str, max_chars: int = 80) -> str:
    """Quote the beginning of a text for a message."""
    return repr(text if len(text) <= max_chars else f"{text[:max_chars]}...")


def _find_fault(mark: str, in_class: str) -> str:
    """Return what is wrong with a mark inside the class that `in_class` opened, or outside of any."""
    if mark[0] == "\\":
        return _find_escape_fault(mark[1], in_class)
    if in_class:
        return f"{mark!r} in a class; escape it" if mark[0] in "[&-~|" else ""
    if mark.endswith("]") and mark != "]":
        return "']' first in a class; escape it"
    if mark == "(?":
        return "'(?' that begins neither '(?:' nor '(?P<'"
    if mark == "{,":
        return "'{,'; write '{0,'"
    return f"possessive {mark!r}" if mark.endswith("+") else ""


def _find_escape_fault(character: str, in_class: str) -> str:
    if in_class == "[^" and character in "dw":
        return f"'\\{character}' in a negated class; write its characters out"
    if character not in _SAME_ESCAPES and character.isalnum():
        return f"'\\{character}'" + (f"; write '{_INSTEAD[character]}'" if character in _INSTEAD else "")
    return ""
