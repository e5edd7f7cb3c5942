"""Small charts as inline SVG text, 360 units wide so that their letters stay readable on a phone; colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
_LEFT, _RIGHT, _TOP, _HEIGHT = 46, 252, 12, 190

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart; ``style`` is a class of the page's style, ``dash`` an SVG dash pattern."""

    label: str
    style: str
    points: Sequence[Point]
    dash: str = ""


@dataclass(frozen=True)
class Mark:
    """A numbered place in a roofline picture."""

    text: str
    style: str
    point: Point
    title: str


@dataclass(frozen=True)
class Bar:
    """One bar: its length as a share of the limit, and what is written behind it."""

    label: str
    style: str
    share: float
    text: str


def number(value: float) -> str:
    """Three significant digits, thousands separated, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within the range, at most seven."""
    if not log:
        raw = (high - low) / 4 or 1.0
        step = next(m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10) if m * 10 ** math.floor(math.log10(raw)) >= raw)
        return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1, 2, 5), (1,)):
        found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(found) <= 7:
            break
    return found[:: math.ceil(len(found) / 7)] if found else [low, high]


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], title: str) -> str:
    """Horizontal bars under a heading per group; the line marks the limit."""
    longest = max([1.0, *(bar.share for _, some in groups for bar in some)])
    left, full = 122, 142
    parts, y = [], 4.0
    for heading, some in groups:
        parts.append(_text(0, y + 11, heading, style="strong"))
        y += 18
        limit = left + full / longest
        parts.append(f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{y - 2:.1f}" y2="{y + 17 * len(some):.1f}" class="limit"/>')
        for bar in some:
            size = max(1.0, full * bar.share / longest)
            parts.append(_text(left - 6, y + 11, _cut(bar.label, 21), "end"))
            parts.append(f'<rect x="{left}" y="{y:.1f}" width="{size:.1f}" height="13" rx="2" class="{bar.style}"/>')
            parts.append(_text(left + full + 6, y + 11, bar.text))
            y += 17
        y += 8
    return _svg(y, title, parts)


def _axes(
    points: Sequence[Point], labels: tuple[str, str], right: float, log: bool, named: Sequence[float] = ()
) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
    """Grid and axis texts, and what brings a value to its place; ``named`` are the ticks of the x axis, where not round numbers."""
    margin = 1.15 if log else 1.05
    bottom, scale = _TOP + _HEIGHT, math.log if log else float
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high, y_low, y_high = (min(xs) / margin, max(xs) * margin, min(ys) / margin, max(ys) * margin) if log else (
        0.0, max(xs) * margin or 1.0, 0.0, max(ys) * margin or 1.0)  # fmt: skip

    def across(value: float) -> float:
        return _LEFT + (scale(value) - scale(x_low)) / (scale(x_high) - scale(x_low)) * (right - _LEFT)

    def up(value: float) -> float:
        return bottom - (scale(value) - scale(y_low)) / (scale(y_high) - scale(y_low)) * _HEIGHT

    parts = []
    for tick in ticks(y_low, y_high, log):
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 5, up(tick) + 4, number(tick), "end"))
    for tick in named or ticks(x_low, x_high, log):
        parts.append(f'<line x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{_TOP}" y2="{bottom}" class="grid"/>')
        parts.append(_text(across(tick), bottom + 15, number(tick), "middle"))
    parts.append(_text((_LEFT + right) / 2, bottom + 31, labels[0], "middle"))
    parts.append(_text(0, _TOP - 2, labels[1]))
    return parts, across, up


def _line(series: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in series.points)
    dash = f' stroke-dasharray="{series.dash}"' if series.dash else ""
    return f'<polyline points="{path}" class="curve {series.style}"{dash}/>'


def curves(series: Sequence[Series], labels: tuple[str, str], title: str, log: bool = True) -> str:
    """Lines with a dot at every measurement and their names at the right, kept apart."""
    points = [point for line in series for point in line.points]
    measured = sorted({x for x, _ in points}) if log else []
    parts, across, up = _axes(points, labels, _RIGHT, log, measured if len(measured) <= 5 else ())
    ends = sorted((up(line.points[-1][1]), line.label, line.style) for line in series)
    place = -math.inf
    for line in series:
        parts.append(_line(line, across, up))
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" class="{line.style}"/>' for x, y in line.points]
    room = _TOP + _HEIGHT + 4
    for left, (y, label, style) in zip(range(len(ends), 0, -1), ends, strict=True):
        place = max(place + 13, min(y + 4, room - 13 * (left - 1)))
        parts.append(_text(_RIGHT + 8, place, _cut(label, 17), style=style))
    return _svg(max(_TOP + _HEIGHT + 36, place + 6), title, parts)


def roofline(roofs: Sequence[tuple[str, float, float]], marks: Sequence[Mark], title: str) -> str:
    """Rate over operations per byte. A roof is (name, operations per second, bytes per second)."""
    right = WIDTH - 8
    spread = [mark.point for mark in marks]
    spread += [point for _, peak, copy in roofs for point in ((peak / copy / 4, peak / 4), (peak / copy * 16, peak * 1.8))]
    parts, across, up = _axes(spread, ("floating-point operations per byte", "TFLOP/s"), right, True)
    ends = [x for x, _ in spread]
    for name, peak, copy in roofs:
        low = max(min(ends), min(y for _, y in spread) / copy)
        parts.append(_line(Series(name, "roof", [(low, low * copy), (peak / copy, peak), (max(ends), peak)]), across, up))
        parts.append(_text(across(max(ends)), up(peak) - 11, f"{name}, {number(peak)} TFLOP/s", "end"))
    for mark in marks:
        x, y = across(mark.point[0]), up(mark.point[1])
        parts.append(f'<g><title>{escape(mark.title)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="7.5" class="mark {mark.style}"/>'
                     f"{_text(x, y + 3.5, mark.text, 'middle', 'inside')}</g>")  # fmt: skip
    return _svg(_TOP + _HEIGHT + 36, title, parts)
