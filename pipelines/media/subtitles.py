"""Subtitles in prompts: parse SRT and WebVTT, cut them to a window, and mark their place until the window is known.

A prompt in the manifest holds `MARK_START`, the SRT of its row, and `MARK_STOP`. Nothing between the marks stands for
the text track of the row's video. Both marks are code points that Unicode reserves for use inside a program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pipelines.media.reference import Window

MARK_START, MARK_STOP = "\ufdd0", "\ufdd1"
TRACK_MARK = MARK_START + MARK_STOP

_MARKED = re.compile(f"{MARK_START}([^{MARK_STOP}]*){MARK_STOP}")
_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_TIMES = re.compile(rf"{_TIME}[ \t]*-->[ \t]*{_TIME}[^\n]*")
_TAGS = re.compile(r"<[^<>\n]*>|\{\\[^{}\n]*\}")  # <i>, <v Speaker>, {\an8}
_NUMBER = re.compile(r"\n\d+\s*$")
_MIN_S = 0.001


class Cue(NamedTuple):
    """One subtitle, shown from `start_s` to `stop_s` from the start of the video."""

    start_s: float
    stop_s: float
    text: str


def parse_subtitles(text: str) -> list[Cue]:
    """Return the cues of SRT or WebVTT, in order and without markup. Raise ValueError if there is none."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    found = list(_TIMES.finditer(plain))
    if not found:
        raise ValueError("it has no line such as 00:00:01,000 --> 00:00:02,500")
    stops = [*(match.start() for match in found[1:]), len(plain)]
    cues = (_make_cue(match, plain[match.end() : stop]) for match, stop in zip(found, stops, strict=True))
    return [cue for cue in cues if cue.text]


def _make_cue(times: re.Match[str], block: str) -> Cue:
    """Build a cue from its times and what follows up to the next ones: its text, a blank line, the next number."""
    lines = re.split(r"\n[ \t]*\n", block.removeprefix("\n"), maxsplit=1)[0]
    return Cue(_to_seconds(times.groups()[:4]), _to_seconds(times.groups()[4:]), clean_text(_NUMBER.sub("", lines)))


def _to_seconds(fields: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = (field or "0" for field in fields)
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def clean_text(text: str) -> str:
    """Return the text of a cue without markup and marks, one line per line of it."""
    plain = remove_subtitle_marks(_TAGS.sub("", text)).replace("\\h", " ")
    return "\n".join(filter(None, (" ".join(line.split()) for line in plain.splitlines())))


def select_cues(cues: Iterable[Cue], window: Window) -> list[Cue]:
    """Return the cues that are shown at some time of the window."""
    return [
        cue for cue in cues if cue.start_s < window.stop_s and max(cue.stop_s, cue.start_s + _MIN_S) > window.start_s
    ]


def join_cues(cues: Iterable[Cue]) -> str:
    """Return the texts of cues as lines, without those that repeat the line before them."""
    lines = [line for cue in cues for line in cue.text.split("\n")]
    return "\n".join(line for number, line in enumerate(lines) if number == 0 or line != lines[number - 1])


def mark_subtitles(text: str | None) -> str:
    """Return the mark to put into a prompt for the subtitles `text` of its row, "" for a row without them.

    Raise ValueError if they are neither SRT nor WebVTT.
    """
    return _mark(parse_subtitles(text)) if text and text.strip() else ""


def _mark(cues: Sequence[Cue]) -> str:
    blocks = (f"{_format_time(cue.start_s)} --> {_format_time(cue.stop_s)}\n{cue.text}\n\n" for cue in cues)
    return f"{MARK_START}{''.join(blocks)}{MARK_STOP}" if cues else ""


def _format_time(time_s: float) -> str:
    seconds, milliseconds = divmod(round(time_s * 1000), 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{milliseconds:03}"


def narrow_subtitles(prompt: str, window: Window) -> str:
    """Leave out the marked cues of a prompt that are not shown in the window; keep the mark of a text track."""

    def narrow(match: re.Match[str]) -> str:
        return _mark(select_cues(_parse_marked(match[1]), window)) if match[1] else match[0]

    return _MARKED.sub(narrow, prompt)


def fill_subtitles(prompt: str, window: Window, read_track: Callable[[], Iterable[Cue]]) -> str:
    """Replace the marks of a prompt by what is shown in the window; `read_track` returns the video's text track."""

    def fill(match: re.Match[str]) -> str:
        return join_cues(select_cues(_parse_marked(match[1]) if match[1] else read_track(), window))

    return _MARKED.sub(fill, prompt)


def _parse_marked(text: str) -> list[Cue]:
    """Return the cues between two marks; none if a prompt from outside holds the marks around something else."""
    try:
        return parse_subtitles(text)
    except ValueError:
        return []


def drop_subtitles(prompt: str) -> str:
    """Return a prompt without its marks and what is between them."""
    return _MARKED.sub("", prompt)


def remove_subtitle_marks(text: str) -> str:
    """Return a text from outside, such as a column's, without the marks, which only this module sets."""
    return text.replace(MARK_START, "").replace(MARK_STOP, "")
