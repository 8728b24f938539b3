"""Small charts as SVG text: grouped bars and scatter plots, for bench plots and for the report of `accelerate`.

No plotting library: a chart is a string that stands alone as a file and can be put inline into HTML, where its text
takes the page's colour. Every mark carries a <title>, which browsers show on hover.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#8a94a6", "#2563eb", "#f59e0b", "#10b981", "#e11d48", "#7c3aed", "#0891b2", "#65a30d")
LEFT, RIGHT, TOP, BOTTOM = 64, 28, 56, 52  # margins in pixels: axis, edge, title and legend, labels


@dataclass(frozen=True)
class Bars:
    """One series of a bar chart: a value for each label (None: no bar), and where known its interval (low, high)."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Points:
    """One series of a scatter plot. `labels` name the points on hover; `line` joins them in order."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    line: bool = False


def bar_chart(
    title: str,
    labels: Sequence[str],
    series: Sequence[Bars],
    *,
    unit: str = "",
    width: int = 640,
    reference: float | None = None,
) -> str:
    """Grouped vertical bars from zero, each with its value above it; a dashed line across at `reference`."""
    height = 320
    tops = [v for s in series for v in s.values if v is not None]
    tops += [i[1] for s in series for i in s.intervals if i is not None]
    tops += [] if reference is None else [reference]
    ticks = linear_ticks(0.0, max(tops, default=1.0) or 1.0)
    y = scale(0.0, ticks[-1], height - BOTTOM, TOP)
    parts = [*y_axis(ticks, y, width), legend([s.name for s in series], width)]
    slot = (width - LEFT - RIGHT) / max(len(labels), 1)
    bar = slot * 0.8 / max(len(series), 1)
    for i, label in enumerate(labels):
        left = LEFT + i * slot + slot * 0.1
        parts.append(text(left + slot * 0.4, height - BOTTOM + 18, label, anchor="middle"))
        for j, one in enumerate(series):
            value = one.values[i]
            if value is None:
                continue
            x, top = left + j * bar, y(value)
            shown = f"{number(value)}{unit and ' ' + unit}"
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar * 0.92:.1f}" height="{height - BOTTOM - top:.1f}" rx="2" '
                f'fill="{colour(j)}"><title>{escape(f"{one.name}, {label}: {shown}")}</title></rect>'
            )
            interval = one.intervals[i] if one.intervals else None
            parts.append(whisker(x + bar * 0.46, y(interval[0]), y(interval[1])) if interval else "")
            above = min(top, y(interval[1])) if interval else top
            parts.append(text(x + bar * 0.46, above - 5, number(value), anchor="middle", size=10 if bar > 20 else 7))
    if reference is not None:
        across = f"M{LEFT} {y(reference):.1f}H{width - RIGHT}"
        parts.append(f'<path d="{across}" stroke="currentColor" stroke-dasharray="5 4" stroke-opacity="0.6"/>')
    return svg(title, unit, width, height, parts)


def scatter_chart(
    title: str,
    series: Sequence[Points],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    width: int = 640,
) -> str:
    """Points, and lines where a series asks for them. A logarithmic axis leaves out what is not positive."""
    height = 360
    kept = [
        (j, s, [i for i in range(len(s.x)) if (s.x[i] > 0 or not log_x) and (s.y[i] > 0 or not log_y)])
        for j, s in enumerate(series)
    ]
    xs = [s.x[i] for _, s, indices in kept for i in indices] or [1.0]
    ys = [s.y[i] for _, s, indices in kept for i in indices] or [1.0]
    x_ticks = log_ticks(min(xs), max(xs)) if log_x else linear_ticks(min(xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else linear_ticks(min(ys), max(ys))
    x = scale(x_ticks[0], x_ticks[-1], LEFT, width - RIGHT, log_x)
    y = scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP, log_y)
    parts = [*y_axis(y_ticks, y, width), legend([s.name for s in series], width)]
    parts += [text(x(t), height - BOTTOM + 18, number(t), anchor="middle") for t in x_ticks]
    parts.append(text((LEFT + width - RIGHT) / 2, height - 12, x_label, anchor="middle"))
    for j, one, indices in kept:
        places = [(x(one.x[i]), y(one.y[i])) for i in indices]
        if one.line and len(places) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour(j)}" stroke-width="2"/>')
        for i, (px, py) in zip(indices, places, strict=True):
            label = one.labels[i] if one.labels else one.name
            hover = escape(f"{label}: {number(one.x[i])}, {number(one.y[i])}")
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour(j)}" fill-opacity="0.75">'
                f"<title>{hover}</title></circle>"
            )
    return svg(title, y_label, width, height, parts)


def scale(low: float, high: float, start: float, stop: float, log: bool = False) -> Callable[[float], float]:
    """A map from values in low..high to pixels in start..stop."""
    move = math.log10 if log else float
    a, b = move(low), move(high)
    span = (b - a) or 1.0
    return lambda value: start + (move(value) - a) / span * (stop - start)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around low..high."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**i for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Three significant digits, thousands written out: 0.0123, 4.5, 1,230."""
    if value == 0 or not math.isfinite(value):
        return str(value) if value else "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="currentColor">{escape(content)}</text>'
    )


def whisker(x: float, low: float, high: float) -> str:
    strokes = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
    return f'<path d="{strokes}" stroke="currentColor" stroke-width="1.5"/>'


def y_axis(ticks: Sequence[float], y: Callable[[float], float], width: int) -> list[str]:
    lines = [
        f'<path d="M{LEFT} {y(t):.1f}H{width - RIGHT}" stroke="currentColor" stroke-opacity="0.15"/>' for t in ticks
    ]
    return lines + [text(LEFT - 8, y(t) + 4, number(t), anchor="end") for t in ticks]


def legend(names: Sequence[str], width: int) -> str:
    """Coloured squares with names, right-aligned on the title's second line; nothing for a single series."""
    if len(names) < 2:
        return ""
    parts, x = [], float(width - RIGHT)
    for j, name in reversed(list(enumerate(names))):
        x -= len(name) * 6.6 + 22
        parts.append(f'<rect x="{x:.1f}" y="32" width="10" height="10" rx="2" fill="{colour(j)}"/>')
        parts.append(text(x + 14, 41, name, size=11))
    return "".join(parts)


def stack(charts: Sequence[str]) -> str:
    """Charts below each other, as one."""
    sizes = [tuple(map(int, re.findall(r'(?:width|height)="(\d+)"', c)[:2])) for c in charts]
    parts, y = [], 0
    for chart, (_, height) in zip(charts, sizes, strict=True):
        parts.append(chart.replace("<svg ", f'<svg y="{y}" ', 1))
        y += height
    width = max(w for w, _ in sizes)
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}">'
    return f"{root}\n{''.join(parts)}</svg>\n"


def svg(title: str, unit: str, width: int, height: int, parts: Sequence[str]) -> str:
    head = text(LEFT - 48, 18, title, size=14, weight="600") + text(LEFT - 48, 41, unit, size=11)
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif">\n{head}\n{body}\n</svg>\n'
    )
