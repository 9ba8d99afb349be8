"""Render the metrics of a run as one HTML page that loads nothing: curves as SVG, sample answers as text."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipelines.training.metrics import MetricLog, Metrics

_WIDTH_PX, _HEIGHT_PX, _LEFT_PX, _BOTTOM_PX = 560, 220, 64, 24
_MAX_POINTS = 600
_COLOURS = ("#1f5fa8", "#c4501b", "#3c8d40", "#8a4fa3", "#b8860b", "#2a9d9d", "#7a5c4f", "#555555")
_STYLE = (
    "body{font:15px system-ui;margin:2rem;max-width:1200px}svg{background:#fafafa;margin:0 1rem 1rem 0}"
    "h2{font-size:1rem;margin:.5rem 0}figure{display:inline-block;margin:0}td,th{padding:.2rem .8rem;text-align:left;"
    "vertical-align:top;border-bottom:1px solid #ccc}text{font-size:11px;fill:#555}"
)

Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """Values under one name, and the names of the metrics that draw them."""

    title: str
    names: tuple[str, ...]


_CURVES = (
    Curve("loss: training, validation", ("loss", "eval_loss")),
    Curve("learning rate", ("learning_rate",)),
    Curve("gradient norm", ("grad_norm",)),
    Curve("tokens/s", ("tokens_per_s",)),
    Curve("share of pairs in the preferred order", ("reward_accuracy", "eval_reward_accuracy")),
    Curve("reward margin", ("reward_margin",)),
)


def render_training_page(title: str, facts: Mapping[str, str], log: MetricLog) -> str:
    """Return the page. `facts`: what to show above the curves, by name."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    curves = [*_CURVES, *_list_data_set_curves(log)]
    figures = (_render_figure(curve, [log.list_points(name) for name in curve.names]) for curve in curves)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>{''.join(figures)}{_render_samples(log.lines)}</html>\n"
    )


def _list_data_set_curves(log: MetricLog) -> list[Curve]:
    """Return the validation losses of the data sets, as many in a figure as there are colours."""
    found = (name for line in log.lines if line["kind"] == "eval" for name in line)
    names = [name for name in dict.fromkeys(found) if name.endswith("_loss") and name != "eval_loss"]
    groups = [names[at : at + len(_COLOURS)] for at in range(0, len(names), len(_COLOURS))]
    return [Curve(f"validation: {', '.join(map(_shorten, group))}", tuple(group)) for group in groups]


def _shorten(name: str) -> str:
    return name.removeprefix("eval_").removesuffix("_loss")


def _render_figure(curve: Curve, lines: Sequence[Points]) -> str:
    drawn = [_thin(points) for points in lines]
    if not any(len(points) > 1 for points in drawn):
        return ""
    steps, values = zip(*[point for points in drawn for point in points], strict=True)
    scale = _Scale(min(steps), max(steps), min(values), max(values))
    paths = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{scale.place_all(points)}"/>'
        for points, colour in zip(drawn, _COLOURS, strict=False)
        if points
    )
    return (
        f"<figure><h2>{html.escape(curve.title)}</h2>"
        f'<svg width="{_WIDTH_PX}" height="{_HEIGHT_PX}" role="img">{scale.render_axes()}{paths}</svg></figure>'
    )


def _thin(points: Points) -> Points:
    """Return at most _MAX_POINTS evenly spread points, the last one among them."""
    every = -(-len(points) // _MAX_POINTS)
    return points[::-1][:: max(1, every)][::-1]


class _Scale(NamedTuple):
    """The values at the edges of a figure."""

    first: float
    last: float
    low: float
    high: float

    def place_all(self, points: Points) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self._place(*point) for point in points))

    def _place(self, step: float, value: float) -> tuple[float, float]:
        across = (step - self.first) / ((self.last - self.first) or 1)
        up = (value - self.low) / ((self.high - self.low) or 1)
        right = _LEFT_PX + across * (_WIDTH_PX - _LEFT_PX - 12)
        return right, _HEIGHT_PX - _BOTTOM_PX - up * (_HEIGHT_PX - _BOTTOM_PX - 12)

    def render_axes(self) -> str:
        """Return lines and numbers at the edges and in the middle."""
        parts = []
        for share in (0.0, 0.5, 1.0):
            value = self.low + share * (self.high - self.low)
            _, y = self._place(self.first, value)
            parts.append(f'<line x1="{_LEFT_PX}" x2="{_WIDTH_PX - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{_LEFT_PX - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
            step = round(self.first + share * (self.last - self.first))
            x, _ = self._place(step, self.low)
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT_PX - 6}" text-anchor="middle">{step}</text>')
        return "".join(parts)


def _render_samples(lines: Sequence[Metrics]) -> str:
    samples = [line for line in lines if line["kind"] == "sample"]
    if not samples:
        return ""
    last = samples[-1]["step"]
    rows = (
        f"<tr><td>{html.escape(line['question'])}</td><td>{html.escape(line['wanted'])}</td>"
        f"<td>{html.escape(line['answer'])}</td></tr>"
        for line in samples
        if line["step"] == last
    )
    head = "<tr><th>question</th><th>wanted</th><th>answer</th></tr>"
    return f"<h2>Answers to held-out rows at step {last}</h2><table>{head}{''.join(rows)}</table>"
