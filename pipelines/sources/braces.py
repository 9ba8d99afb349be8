"""Expand the braces of a shell, as in `shards/{00000..00099}.tar`, and the `::` with which WebDataset joins URLs."""

from __future__ import annotations

import re

from pipelines.errors import SourceError

_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", re.ASCII)
_LETTERS = re.compile(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
_MAX_NAMES = 1_000_000


def expand_names(uri: str) -> list[str]:
    """Return the names that `uri` stands for, in order; [uri] if it has neither braces nor `::`."""
    return [name for part in uri.split("::") for name in _expand_braces(part)]


def _expand_braces(text: str) -> list[str]:
    group = _find_group(text)
    if group is None:
        return [text]
    start, stop = group
    items, tails = _expand_group(text[start + 1 : stop]), _expand_braces(text[stop + 1 :])
    if len(items) * len(tails) > _MAX_NAMES:
        raise SourceError(f"{text} stands for more than {_MAX_NAMES:,} names; use a glob such as DIRECTORY/*.tar")
    return [f"{text[:start]}{item}{tail}" for item in items for tail in tails]


def _find_group(text: str) -> tuple[int, int] | None:
    """Return the positions of the first braces around a range or a list; other braces are part of the name."""
    for start, character in enumerate(text):
        stop = _find_end(text, start) if character == "{" else None
        if stop is not None and (_parse_range(text[start + 1 : stop]) or len(_split_list(text[start + 1 : stop])) > 1):
            return start, stop
    return None


def _find_end(text: str, start: int) -> int | None:
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return None


def _expand_group(inside: str) -> list[str]:
    names = _parse_range(inside)
    return names or [name for item in _split_list(inside) for name in _expand_braces(item)]


def _split_list(inside: str) -> list[str]:
    """Split at the commas that are not inside further braces."""
    items, depth = [""], 0
    for character in inside:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return items


def _parse_range(inside: str) -> list[str]:
    """Return the names of a range of numbers or letters, [] if it is neither. Zeros in front set the width."""
    if match := _LETTERS.fullmatch(inside):
        first, last = (ord(letter) for letter in match.groups() if letter)
        return [chr(code) for code in _span(first, last, 1, inside)]
    if not (match := _NUMBERS.fullmatch(inside)):
        return []
    has_zeros = any(number.lstrip("-").startswith("0") and len(number.lstrip("-")) > 1 for number in match.groups()[:2])
    width = max(map(len, match.groups()[:2])) if has_zeros else 0
    numbers = _span(int(match[1]), int(match[2]), abs(int(match[3] or 1)) or 1, inside)
    return [f"{number:0{width}}" for number in numbers]


def _span(first: int, last: int, step: int, inside: str) -> range:
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if abs(last - first) // step >= _MAX_NAMES:
        raise SourceError(f"{{{inside}}} stands for more than {_MAX_NAMES:,} names; use a glob such as DIRECTORY/*.tar")
    return numbers
