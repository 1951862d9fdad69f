"""Two charts as SVG text: lines over a common axis, and bars in groups.

A writer of our own: what `novafs simulate --plot` draws is a few dozen shapes, and a plotting library would add more to an
installation than all of NovaFS. Labels are escaped; colours are told apart with any kind of colour vision (M. Okabe, K. Ito, 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
WIDTH: Final = 860
HEIGHT: Final = 460
LEFT: Final = 60
TOP: Final = 50
BOTTOM: Final = 70
LEGEND: Final = 200

Series = tuple[str, Sequence[float]]


def line_chart(title: str, x_labels: Sequence[str], series: Sequence[Series], y_label: str) -> str:
    """Values from 0 to 1 over labelled positions, one line per series."""
    span = WIDTH - LEFT - LEGEND
    step = span / max(1, len(x_labels) - 1)
    shapes = [_text(LEFT + number * step, HEIGHT - BOTTOM + 20, label, "middle") for number, label in enumerate(x_labels)]
    for number, (_, values) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        points = [(LEFT + at * step, _y(value)) for at, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
    return _page(title, y_label, shapes, [name for name, _ in series])


def bar_chart(title: str, groups: Sequence[str], series: Sequence[Series], y_label: str) -> str:
    """Values from 0 to 1 in groups, one bar of each per series."""
    span = (WIDTH - LEFT - LEGEND) / max(1, len(groups))
    width = span * 0.8 / max(1, len(series))
    shapes = []
    for group, label in enumerate(groups):
        left = LEFT + group * span + span * 0.1
        shapes.append(_text(left + span * 0.4, HEIGHT - BOTTOM + 20, label, "middle"))
        for number, (_, values) in enumerate(series):
            top = _y(values[group])
            shapes.append(
                f'<rect x="{left + number * width:.1f}" y="{top:.1f}" width="{width * 0.92:.1f}" height="{_y(0) - top:.1f}" '
                f'fill="{COLOURS[number % len(COLOURS)]}"/>'
            )
    return _page(title, y_label, shapes, [name for name, _ in series])


def _y(value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - min(1.0, max(0.0, value)))


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _page(title: str, y_label: str, shapes: Sequence[str], names: Sequence[str]) -> str:
    right = WIDTH - LEGEND
    frame = [_text(LEFT, 24, title, size=15), _text(LEFT, 42, y_label, size=11)]
    for tenth in range(0, 11, 2):
        y = _y(tenth / 10)
        frame.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        frame.append(_text(LEFT - 8, y + 4, f"{tenth / 10:.1f}", "end", 11))
    for number, name in enumerate(names):
        y = TOP + 18 * number
        frame.append(f'<rect x="{right + 16}" y="{y}" width="12" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>')
        frame.append(_text(right + 34, y + 11, name))
    body = "\n".join([*frame, *shapes])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )
