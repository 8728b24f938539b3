"""The report's further plots: speed against bytes beside other engines, and times predicted against times measured."""

from __future__ import annotations

from typing import Any

from hasten.bench.chart import Points, linear_ticks, number, scale, scatter_chart, svg, text
from hasten.search.plots import BLUE, BOTTOM, GREEN, GREY, LEFT, RIGHT, ROSE, TOP, dot
from hasten.search.predict import CLOSE

Json = dict[str, Any]


def beside(document: Json) -> str:
    """Decode tokens a second against bytes of a step, of the original, the accelerated model and other engines.

    "" where no peers' report was given.
    """
    if not document["peers"] or document["after"] is None:
        return ""
    sides = [("original", document["before"]), ("accelerated", document["after"])]
    own = [(name, side["matrix_bytes"] / 1e6, side["decode_tokens_per_second"]) for name, side in sides]
    others = [(p["engine"], p["bytes"] / 1e6, p["decode"]) for p in document["peers"]["points"]]
    series = [
        Points(name, [row[1] for row in rows], [row[2] for row in rows], [row[0] for row in rows])
        for name, rows in (("this search", own), ("other engines", others))
    ]
    return scatter_chart(
        "Beside other engines",
        series,
        x_label="MB read for a token",
        y_label="decode tokens/s, batch 1; the peers' as their report has them",
    )


def predictions(document: Json) -> str:
    """Each timed candidate: its time as predicted and as measured, as shares of the original's; "" without any."""
    found = document["predictions"]
    if not found:
        return ""
    values = [v for p in found for v in (p["composed"], p["expected"], p["corrected"], p["low"], p["high"])]
    ticks = linear_ticks(min(values) * 0.95, max(values) * 1.05)
    width, height = 620, 360
    x = scale(ticks[0], ticks[-1], LEFT, width - RIGHT)
    y = scale(ticks[0], ticks[-1], height - BOTTOM, TOP)
    parts = []
    for t in ticks:
        line = f"M{LEFT} {y(t):.1f}H{width - RIGHT}"
        parts.append(f'<path d="{line}" stroke="currentColor" stroke-opacity="0.13"/>')
        parts.append(text(LEFT - 8, y(t) + 4, number(t), anchor="end", size=11))
        parts.append(text(x(t), height - BOTTOM + 18, number(t), anchor="middle", size=11))
    first, last = ticks[0], ticks[-1]
    for factor, dashes in ((1.0, ""), (1 + CLOSE, "3 4"), (1 / (1 + CLOSE), "3 4")):
        begin, end = max(first, first / factor), min(last, last / factor)
        line = f"M{x(begin):.1f} {y(begin * factor):.1f}L{x(end):.1f} {y(end * factor):.1f}"
        parts.append(f'<path d="{line}" stroke="{ROSE}" stroke-opacity="0.6" stroke-dasharray="{dashes}" fill="none"/>')
    for p in found:
        near = abs(p["error"]) <= CLOSE
        for key, fill in (("composed", GREY), ("corrected", ROSE), ("expected", GREEN if near else BLUE)):
            hover = f"{p['name']}: {key} {p[key]:.3f}, measured {p['measured']:.3f} ({p['low']:.3f} to {p['high']:.3f})"
            parts.append(dot(x(p[key]), y(p["measured"]), fill, hover))
    label = "predicted: grey of kernels alone; green or blue by whole models before; red by others of the same rounds"
    parts.append(text((LEFT + width - RIGHT) / 2, height - 12, label, anchor="middle", size=11))
    what = f"measured time, as a share of the original's; dashed: {CLOSE:.0%} off"
    return svg("Times predicted and measured", what, width, height, parts)
