"""Read pages of Markdown: code blocks and spans, links, headings, tables."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tests.support.roots import ROOT

PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@cache
def read_page(page: Path) -> str:
    """Return the text; a command that continues after a backslash is one line."""
    return re.sub(r"\\\n\s*", " ", page.read_text("utf-8"))


def list_blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return [code for found, code in _FENCE.findall(read_page(page)) if found == language]


def list_spans(text: str) -> list[str]:
    """Return the code spans outside of code blocks; one that is broken over two lines is joined."""
    return [span.replace("\n", " ") for span in _SPAN.findall(_FENCE.sub("", text))]


def list_code_lines(page: Path) -> list[str]:
    """Return the lines of code blocks and code spans, without comments."""
    blocks = (code for _, code in _FENCE.findall(read_page(page)))
    return [
        re.sub(r"(^|\s)#.*", "", line) for code in [*blocks, *list_spans(read_page(page))] for line in code.split("\n")
    ]


def list_links(page: Path) -> list[str]:
    """Return the targets of links and images."""
    return _LINK.findall(read_page(page))


def list_anchors(page: Path) -> set[str]:
    """Return the link targets that the headings of a page give."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def read_section(page: Path, heading: str) -> str:
    """Return a section without its heading, with the sections below it."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,2}} |\Z)", read_page(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {heading!r}"
    return found[2]


def read_table(text: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose head begins with this cell."""
    found = re.search(rf"^\| *{re.escape(head)} *\|.*\n\|[-| :]+\n((?:\|.*\n?)+)", text, re.MULTILINE)
    assert found, f"no table begins with | {head} |"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
