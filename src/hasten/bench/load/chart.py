"""The plots of a load: how latencies are distributed, how they went over time, and what was under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hasten.bench.chart import Points, scatter_chart, stack
from hasten.bench.load import summary
from hasten.bench.load.client import Record
from hasten.bench.load.run import Result

WIDTH = 960
MOST_POINTS = 1500  # a mark each: a plot that a browser still opens
STEPS = 100


def charts(found: Mapping[str, Any], result: Result) -> str:
    """One SVG."""
    done = [r for r in result.records if r.outcome == "completed"]
    model = f"{found['target']['model']}, {found['load']['kind']}"
    drawn = [over_time(result, model), under_way(result)]
    if done:
        drawn = [distribution(done, model), *drawn]
    return stack(drawn)


def distribution(done: Sequence[Record], model: str) -> str:
    """Share of requests (of gaps, for the inter-token latency) at or below each latency."""
    values = {
        "TTFT": [v for r in done if (v := summary.ttft(r)) is not None],
        "TPOT": [v for r in done if (v := summary.tpot(r)) is not None],
        "ITL": [gap for r in done for gap in summary.itl(r)],
        "end to end": [v for r in done if (v := summary.e2e(r)) is not None],
    }
    shares = np.linspace(0, 100, STEPS + 1)
    series = [
        Points(
            name,
            (np.percentile(each, shares) * 1e3).tolist(),
            shares.tolist(),
            [f"{name}, p{share:g}" for share in shares],
            line=True,
        )
        for name, each in values.items()
        if each
    ]
    return scatter_chart(
        f"Latencies, {model}", series, x_label="milliseconds", y_label="% at or below", log_x=True, width=WIDTH
    )


def over_time(result: Result, model: str) -> str:
    """Time to first token and end to end of each request, and where requests were refused or failed."""
    records = thinned(result.records)
    series = []
    for name, value in (("TTFT", summary.ttft), ("end to end", summary.e2e)):
        kept = [(r, v) for r in records if r.outcome == "completed" and (v := value(r)) is not None]
        labels = [f"{name} of request {r.number}, {r.prompt} + {r.new} tokens" for r, _ in kept]
        series.append(Points(name, [r.started - result.start for r, _ in kept], [v * 1e3 for _, v in kept], labels))
    for name in ("refused", "failed"):
        lost = [r for r in records if r.outcome == name]
        taken = [((r.finished or r.started) - r.started) * 1e3 for r in lost]
        labels = [f"{name}, request {r.number}: {r.error}" for r in lost]
        series.append(Points(name, [r.started - result.start for r in lost], taken, labels))
    series = [one for one in series if one.x]
    return scatter_chart(
        f"Over time, {model}", series, x_label="seconds, when sent", y_label="ms", log_y=True, width=WIDTH
    )


def under_way(result: Result) -> str:
    """Requests under way over time, and of these the ones still without a first token."""
    span = max(result.end - result.start, 1e-6)
    at = np.linspace(0, span, 2 * STEPS + 1)
    started = np.sort([r.started - result.start for r in result.records])
    ended = [(result.end if r.finished is None else r.finished) - result.start for r in result.records]
    first = [r.chunks[0] - result.start if r.chunks else end for r, end in zip(result.records, ended, strict=True)]
    begun = np.searchsorted(started, at, "right")
    series = [
        Points(name, at.tolist(), (begun - np.searchsorted(np.sort(times), at, "right")).tolist(), line=True)
        for name, times in (("under way", ended), ("before their first token", first))
    ]
    return scatter_chart("Requests under way", series, x_label="seconds", y_label="requests", width=WIDTH)


def thinned(records: Sequence[Record]) -> Sequence[Record]:
    """Every so manieth, so that at most MOST_POINTS stay."""
    return records[:: -(-len(records) // MOST_POINTS) or 1]
