"""The report's plots as inline SVG: candidates, speeds beside the machine's limit, and the map of the model.

Text and axes take the page's colour, so plots follow its light and dark scheme; every mark says more on hover.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from hasten.bench.chart import linear_ticks, number, scale, svg, text, whisker
from hasten.search.budget import SHOWN

Json = dict[str, Any]
GREY, BLUE, GREEN, ROSE = "#8a94a6", "#2563eb", "#10b981", "#e11d48"
LOSSES = {
    "ppl": "perplexity above the original's, %",
    "kl": "KL divergence from the original, nats a token",
    "agree": "tokens whose most likely next one is another, %",
    "task": "accuracy lost, points",
}
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 60, 52
SHADES = (
    (4.0, (13, 148, 136)),
    (5.0, (101, 163, 13)),
    (8.5, (217, 119, 6)),
    (16.0, (190, 80, 110)),
    (32.0, (120, 80, 160)),
)
"""Bits a weight -> colour; between them it is mixed."""


def candidates(document: Json, axis: str) -> str:
    """Loss of every measured whole candidate, with its interval, over `axis`: "cost" or "bytes"; and the frontier."""
    part, limit = document["budget"]["parts"][0], document["budget"]["limit"]
    factor, kind, _ = SHOWN[part["measure"]]
    unit, divisor = _cost_unit(document) if axis == "cost" else ("MB of matrices", 1e6)
    known = [p for p in document["candidates"] if None not in (p["estimate"], p["low"], p["high"])]
    points = [p for p in known if limit is None or p["estimate"] < 6 * limit] or known
    xs = [p[axis] / divisor for p in points]
    margin = 0.15 * (max(xs) - min(xs)) or 0.1 * max(xs)
    x_ticks = linear_ticks(max(0.0, min(xs) - margin), max(xs) + margin)
    y_ticks = linear_ticks(
        min(0.0, *(p["low"] * factor for p in points)), factor * max(1.5 * (limit or 0.0), *(p["high"] for p in points))
    )
    width, height = 620, 360
    x = scale(x_ticks[0], x_ticks[-1], LEFT, width - RIGHT)
    y = scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP)
    line = f'M{LEFT} {{:.1f}}H{width - RIGHT}"'
    parts = [f'<path d="{line.format(y(t))} stroke="currentColor" stroke-opacity="0.13"/>' for t in y_ticks]
    parts += [text(LEFT - 8, y(t) + 4, number(t), anchor="end", size=11) for t in y_ticks]
    parts += [text(x(t), height - BOTTOM + 18, number(t), anchor="middle", size=11) for t in x_ticks]
    parts.append(text((LEFT + width - RIGHT) / 2, height - 12, unit, anchor="middle"))
    if limit is not None:
        budget = y(limit * factor)
        parts.append(f'<path d="{line.format(budget)} stroke="{ROSE}" stroke-width="1.5" stroke-dasharray="6 4"/>')
        parts.append(text(width - RIGHT, budget - 6, f"budget {part['text']}", anchor="end", size=11))
    origin = f"original: 0 at {number(_original(document, axis) / divisor)}"
    parts.append(text(width - RIGHT, 41, origin, anchor="end", size=11))
    best = frontier([(p[axis], p["estimate"]) for p in points])
    path = " ".join(f"{x(a / divisor):.1f},{y(b * factor):.1f}" for a, b in best)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{GREEN}" stroke-opacity="0.6" stroke-width="1.5"/>')
    for p in sorted(points, key=lambda p: bool(p["chosen"])):
        place = x(p[axis] / divisor), y(p["estimate"] * factor)
        fill = GREEN if p["chosen"] else BLUE if p["fits"] else GREY
        parts.append(f'<g opacity="0.45">{whisker(place[0], y(p["low"] * factor), y(p["high"] * factor))}</g>')
        loss = f"{number(p['estimate'] * factor)}{kind}"
        hover = f"{p['name']}: {loss}, {number(p[axis] / divisor)} {unit}\n{p['recipe']}"
        parts.append(dot(*place, fill, hover))
        if p["chosen"] or p["allowance"] is None:
            left = place[0] > 0.7 * width
            label = "chosen" if p["chosen"] else p["name"]
            parts.append(
                text(place[0] + (-9 if left else 9), place[1] + 4, label, anchor="end" if left else "start", size=11)
            )
    what = LOSSES[part["measure"]]
    title = "Loss against size" if unit.startswith("MB") else "Loss against time"
    return svg(title, what + ", with 95% intervals", width, height, parts)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both, by the first: Pareto's frontier."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def _cost_unit(document: Json) -> tuple[str, float]:
    if document["objective"] == "memory":
        return "MB of matrices", 1e6
    return f"microseconds of matrix products a {document['aim']['unit']} (predicted)", 1e-6


def _original(document: Json, axis: str) -> float:
    if axis == "cost" and document["candidates"]:
        return float(document["candidates"][0]["cost_of_original"])
    if axis != "bytes":
        return 0.0
    if document["before"]:  # the tensors may be those of another shape
        return float(document["before"]["matrix_bytes"])
    return float(sum(t["choices"][0].get("bytes", 0) for t in document["tensors"]))


def dot(x: float, y: float, fill: str, hover: str) -> str:
    """A mark that says more on hover."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}"><title>{escape(hover)}</title></circle>'


def speeds(document: Json) -> str:
    """Prefill and decode before and after; the outline is what the machine could do at best with those weights."""
    rows = []
    for part in ("prefill", "decode"):
        for side, name in (("before", "original"), ("after", "accelerated")):
            rate, share = document[side][f"{part}_tokens_per_second"], document[side][f"{part}_share_of_limit"]
            rows.append((part, name, rate, share))
    width, left, right, bar, gap = 620, 150, 130, 26, 12
    parts, at = [], 68.0
    for part in ("prefill", "decode"):
        own = [r for r in rows if r[0] == part]
        top = max(max(r[2], r[2] / r[3]) if r[3] > 0 else r[2] for r in own)
        # A limit far away would squeeze the bars: it is then only told in words.
        top = min(top, 3 * max(r[2] for r in own))
        across = scale(0.0, top, left, width - right)
        parts.append(text(16, at + 8, f"{part}, tokens/s", size=12, weight="600"))
        at += 18
        for _, name, rate, share in own:
            fill = GREY if name == "original" else BLUE
            limit = rate / share if share > 0 else rate
            end = min(across(limit), width - right)
            parts.append(text(left - 10, at + bar / 2 + 4, name, anchor="end"))
            if limit > rate:
                parts.append(
                    f'<rect x="{left}" y="{at}" width="{end - left:.1f}" height="{bar}" rx="3" fill="none" '
                    f'stroke="currentColor" stroke-opacity="0.35" stroke-dasharray="4 3"/>'
                )
            hover = escape(f"{name} {part}: {number(rate)} tokens/s, {share:.0%} of the limit {number(limit)}")
            parts.append(
                f'<rect x="{left}" y="{at}" width="{across(rate) - left:.1f}" height="{bar}" rx="3" fill="{fill}">'
                f"<title>{hover}</title></rect>"
            )
            parts.append(text(width - right + 10, at + bar / 2 + 4, f"{number(rate)} ({share:.0%})", size=12))
            at += bar + gap
        at += 14
    return svg(
        "Speed", "dashed: the machine's limit for these weights, measured in the same run", width, int(at), parts
    )


def model_map(document: Json) -> str:
    """Every matrix as a cell coloured by bits: blocks from left to right, places in a block from top to bottom."""
    cells = document["tensors"]
    blocks = sorted({c["block"] for c in cells if "*" in c["role"]})
    roles = list(dict.fromkeys(c["role"] for c in cells if "*" in c["role"]))
    alone = [c for c in cells if "*" not in c["role"]]
    shorten = _shortener(roles)
    left, top, row = 170, 56, 26
    column = min(72.0, 1000 / max(len(blocks), 1))
    width = int(max(620, left + column * len(blocks) + 16))
    parts = []
    for j, block in enumerate(blocks):
        if column >= 22 or j % 4 == 0:
            parts.append(text(left + (j + 0.5) * column, top - 6, str(block), anchor="middle", size=11))
    for i, role in enumerate(roles):
        parts.append(text(left - 10, top + i * row + 17, shorten(role), anchor="end", size=11))
        for cell in (c for c in cells if c["role"] == role):
            x = left + blocks.index(cell["block"]) * column
            parts.append(_cell(cell, x, top + i * row, column - 2, row - 3))
    for i, cell in enumerate(alone):
        y = top + (len(roles) + i) * row + 10
        parts.append(text(left - 10, y + 17, shorten(cell["role"]), anchor="end", size=11))
        parts.append(_cell(cell, left, y, max(column * max(len(blocks), 1), 60) - 2, row - 3))
    at = top + (len(roles) + len(alone)) * row + 34
    x = left
    for name, bits in _formats(cells):
        parts.append(f'<rect x="{x}" y="{at - 10}" width="12" height="12" rx="2" fill="{shade(bits)}"/>')
        parts.append(text(x + 17, at, f"{name} ({bits:.2f} bits)", size=11))
        x += 185
        if x > width - 180:
            x, at = left, at + 20
    return svg("Map of the model", "blocks from left to right", width, at + 20, parts)


def _cell(cell: Json, x: float, y: float, width: float, height: float) -> str:
    shape = " x ".join(map(str, cell["shape"]))
    hover = f"{cell['name']}\n{shape}\n{cell['format']} by {cell['method']}, {cell['bits']:.2f} bits"
    box = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="3" fill="{shade(cell["bits"])}">'
        f"<title>{escape(hover)}</title></rect>"
    )
    if width < 34:
        return box
    label = cell["format"].replace("codebook", "cb") if width >= 50 else f"{cell['bits']:.1f}"
    return box + (
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle" font-size="10.5" '
        f'fill="#fff" pointer-events="none">{escape(label)}</text>'
    )


def _formats(cells: Sequence[Json]) -> list[tuple[str, float]]:
    """Formats in use, with their bits over all matrices that have them."""
    found = {}
    for name in dict.fromkeys(c["format"] for c in cells):
        own = [c for c in cells if c["format"] == name]
        weights = [c["shape"][0] * c["shape"][1] for c in own]
        found[name] = sum(c["bits"] * w for c, w in zip(own, weights, strict=True)) / sum(weights)
    return sorted(found.items(), key=lambda item: item[1])


def _shortener(roles: Sequence[str]) -> Any:
    """Names without what every block's have in common."""
    prefix = roles[0].split("*")[0] + "*." if roles else ""

    def shorten(role: str) -> str:
        return role.removeprefix(prefix).removeprefix("model.").removesuffix(".weight")

    return shorten


def shade(bits: float) -> str:
    """The colour of so many bits a weight."""
    place = math.log2(max(bits, 1.0))
    for (low, a), (high, b) in itertools.pairwise(SHADES):
        if bits <= high:
            t = min(max((place - math.log2(low)) / (math.log2(high) - math.log2(low)), 0.0), 1.0)
            return "#" + "".join(f"{round(p + (q - p) * t):02x}" for p, q in zip(a, b, strict=True))
    return "#" + "".join(f"{c:02x}" for c in SHADES[-1][1])
