"""Render the comparison of two runs as one HTML file without scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Json = dict[str, Any]

_STYLE = """
:root { --page: #f6f6f3; --panel: #fff; --line: #dfdfd8; --ink: #1c1d20; --soft: #55595f;
  --same: #dcefe4; --other: #fae5e1 }
@media (prefers-color-scheme: dark) { :root { --page: #121315; --panel: #1b1d20; --line: #303338; --ink: #e9e9e6;
  --soft: #b0b4ba; --same: #16301f; --other: #3a1c18 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1280px; padding: 16px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 21px } h2 { font-size: 16px; margin: 28px 0 8px } h3 { font-size: 14px; margin: 0 }
.soft { color: var(--soft) } h2 .soft { font-weight: 400; font-size: 13px }
.tasks { display: flex; flex-wrap: wrap; gap: 0 40px; align-items: start } .tasks section { max-width: 100% }
.figures { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 0 }
.figures dt { color: var(--soft); font-size: 12px }
.figures dd { margin: 0; font-size: 18px }
.wide { overflow-x: auto } table { border-collapse: collapse; background: var(--panel) }
th, td { border: 1px solid var(--line); padding: 3px 8px; text-align: right; font-variant-numeric: tabular-nums }
th { font-weight: 600; overflow-wrap: normal }
td.none { color: var(--soft) }
td.same { background: var(--same) } td.other { background: var(--other) }
.row { display: grid; grid-template-columns: 200px 1fr; gap: 16px; background: var(--panel); padding: 12px;
  border: 1px solid var(--line); border-radius: 6px; margin: 10px 0 }
.row img { max-width: 100%; height: auto; display: block; margin-bottom: 4px }
.strip { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; align-items: start } .row p { margin: 0 0 4px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 16px } .pair p { margin: 0; white-space: pre-wrap }
.pair h3, .pair .asked { grid-column: 1 / -1 } .pair h3 { margin-top: 6px }
@media (max-width: 640px) { .row { grid-template-columns: 1fr } .row img { max-height: 200px; width: auto } }
"""


def render_comparison(
    *, names: tuple[str, str], figures: Mapping[str, int], tables: Sequence[Json], rows: Sequence[Json]
) -> bytes:
    """Return the page, as UTF-8. All text is escaped, and the page may load and run nothing."""
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; img-src data:; base-uri 'none'; form-action 'none'"
    first, second = map(_to_html, names)
    body = [
        f"<h1>{first} and {second}</h1>",
        f'<p class="soft">Rows of a table are answers of {first}, columns those of {second}.</p>',
        _render_figures({name: f"{count:,}" for name, count in figures.items()}),
        '<main><div class="tasks">',
        *map(_render_task, tables),
        "</div>",
        f"<h2>Rows that differ <span class='soft'>{len(rows):,} shown</span></h2>",
        *(_render_row(row, names) for row in rows),
        "</main>",
    ]
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{first} and {second}</title><style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *body, "</body></html>"]).encode("utf-8", "backslashreplace")


def _to_html(value: Any) -> str:
    return escape(str(value))


def _render_figures(figures: Mapping[str, str]) -> str:
    pairs = "".join(f"<div><dt>{_to_html(name)}</dt><dd>{_to_html(text)}</dd></div>" for name, text in figures.items())
    return f'<dl class="figures">{pairs}</dl>'


def _render_task(table: Json) -> str:
    share = "no row has both answers" if table["agreement"] is None else f"{table['agreement']:.1%} agree"
    counts = f"{table['agree']:,} of {table['both']:,}; {table['unanswered']:,} answered by one run only"
    title = f"<h2>{_to_html(table['task'])} <span class='soft'>{share} ({counts})</span></h2>"
    return f"<section>{title}{_render_confusion(table['confusion']) if table['confusion'] else ''}</section>"


def _render_confusion(confusion: Json) -> str:
    values = confusion["values"]
    head = "".join(f'<th scope="col">{_to_html(value)}</th>' for value in values)
    lines = [f"<tr><td></td>{head}</tr>"]
    for place, (value, counts) in enumerate(zip(values, confusion["counts"], strict=True)):
        cells = "".join(
            f'<td class="{"same" if place == other else "other" if count else "none"}">{count:,}</td>'
            for other, count in enumerate(counts)
        )
        lines.append(f'<tr><th scope="row">{_to_html(value)}</th>{cells}</tr>')
    return f'<div class="wide" tabindex="0"><table>{"".join(lines)}</table></div>'


def _render_row(row: Json, names: tuple[str, str]) -> str:
    answers = "".join(
        f"<h3>{_to_html(task)}</h3>"
        + (f'<p class="soft asked">{_to_html(question)}</p>' if question else "")
        + "".join(_render_answer(*pair) for pair in zip(names, (one, other), strict=True))
        for task, question, one, other in row["answers"]
    )
    seen = [_render_media(media) for media in row["media"]]
    if len(seen) > 1:  # the runs did not see the same
        seen = [f'<p class="soft">{_to_html(name)}</p>{part}' for name, part in zip(names, seen, strict=True)]
    return (
        f'<article class="row"><div>{"".join(seen)}<p class="soft">{_to_html(row["id"])}</p></div>'
        f'<div class="pair">{answers}</div></article>'
    )


def _render_media(media: Json) -> str:
    if "missing" in media:
        return f'<p class="soft">{_to_html(media["missing"])}</p>'
    pictures = "".join(f'<img alt="" src="{_to_html(image["src"])}">' for image in media["images"])
    more = f'<p class="soft">and {media["more"]:,} more</p>' if media["more"] else ""
    return f'<div class="{"strip" if len(media["images"]) > 1 else "single"}">{pictures}</div>{more}'


def _render_answer(name: str, answer: str) -> str:
    return f'<p><span class="soft">{_to_html(name)}</span><br>{_to_html(answer)}</p>'
