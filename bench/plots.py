"""Bars as SVG: so little that it needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _NAMES, _FIGURES = 760, 170, 150
_LINE, _BAR, _TOP = 26, 16, 40


class Bar(NamedTuple):
    """One arm: its median, and from where to where its runs reached."""

    name: str
    low: float
    median: float
    high: float
    is_ours: bool


def bars(title: str, unit: str, found: Sequence[Bar]) -> str:
    """A bar for each median, with a line for the spread."""
    scale = (_WIDTH - _NAMES - _FIGURES) / (max(bar.high for bar in found) or 1)
    height = _TOP + _LINE * len(found) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>',
    ]
    for number, bar in enumerate(found):
        top = _TOP + _LINE * number
        middle, text = top + _BAR / 2, top + _BAR - 3
        colour = "#2b6cb0" if bar.is_ours else "#a0aec0"
        low, high = _NAMES + bar.low * scale, _NAMES + bar.high * scale
        parts += [
            f'<text x="{_NAMES - 8}" y="{text}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect x="{_NAMES}" y="{top}" width="{bar.median * scale:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="black"/>',
            f'<text x="{high + 8:.1f}" y="{text}">{_figure(bar.median)} {escape(unit)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _figure(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1}f}"
