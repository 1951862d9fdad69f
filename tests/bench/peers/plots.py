"""Ranges along a logarithmic axis as SVG text: one line for each, from the least to the most, with a dot at the median."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from novafs.svgplot import COLOURS

WIDTH = 980
LABELS = 500
LEFT, RIGHT, TOP, STEP, BOTTOM = 16, 70, 70, 24, 40
TICKS = [mantissa * 10.0**exponent for exponent in range(-3, 4) for mantissa in (1, 2, 5)]


class Span(NamedTuple):
    """One line. group: which colour."""

    label: str
    least: float
    median: float
    most: float
    group: int = 0


def range_chart(title: str, subtitle: str, spans: Sequence[Span], *, line: float | None = None, groups: Sequence[str] = ()) -> str:
    """Positive values; line: where a vertical one stands."""
    low = min([span.least for span in spans] + ([line] if line else []))
    high = max([span.most for span in spans] + ([line] if line else []))
    first = max((tick for tick in TICKS if tick <= low), default=TICKS[0])
    last = min((tick for tick in TICKS if tick >= high), default=TICKS[-1])
    if last <= first:
        last = first * 10
    height = TOP + STEP * len(spans) + BOTTOM

    def x(value: float) -> float:
        share = math.log(min(max(value, first), last) / first) / math.log(last / first)
        return LABELS + (WIDTH - RIGHT - LABELS) * share

    shapes = [_text(LEFT, 24, title, size=15), _text(LEFT, 42, subtitle, size=11)]
    for number, group in enumerate(groups):
        shapes.append(f'<circle cx="{LABELS + 150 * number}" cy="38" r="5" fill="{COLOURS[number]}"/>')
        shapes.append(_text(LABELS + 10 + 150 * number, 42, group, size=11))
    bottom = height - BOTTOM
    for tick in TICKS:
        if first <= tick <= last:
            shapes.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 10}" y2="{bottom}" stroke="#ddd"/>')
            shapes.append(_text(x(tick), bottom + 18, f"{tick:g}", "middle", 11))
    if line is not None:
        shapes.append(f'<line x1="{x(line):.1f}" x2="{x(line):.1f}" y1="{TOP - 10}" y2="{bottom}" stroke="#000" stroke-width="1.5"/>')
    for number, span in enumerate(spans):
        y = TOP + STEP * number + STEP / 2
        colour = COLOURS[span.group]
        shapes.append(_text(LABELS - 12, y + 4, span.label, "end"))
        shapes.append(f'<line x1="{x(span.least):.1f}" x2="{x(span.most):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="4"/>')
        shapes.append(f'<circle cx="{x(span.median):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        shapes.append(_text(x(span.most) + 10, y + 4, f"{span.median:.3g}", size=11))
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif">\n<rect width="{WIDTH}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
