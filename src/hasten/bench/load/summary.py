"""The figures of a load, from its requests' records. docs/load.md defines each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hasten.bench.load.client import Record
from hasten.bench.load.run import Result
from hasten.errors import InputError

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2e")
LIMITED = ("ttft", "tpot", "e2e")  # what --slo can bound: the figures that each request has one of
LIMIT = re.compile(r"([a-z0-9]+)=(\d+(?:\.\d+)?)(ms|s)", re.ASCII)


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """{"ttft": seconds, ...} from texts like ttft=500ms and e2e=2s. Raises InputError."""
    limits: dict[str, float] = {}
    for text in texts:
        found = LIMIT.fullmatch(text)
        if not found or found[1] not in LIMITED:
            raise InputError(f"--slo {text!r} is no limit", f"NAME=500ms or NAME=2s, NAME one of {', '.join(LIMITED)}")
        if found[1] in limits:
            raise InputError(f"--slo limits {found[1]} twice")
        limits[found[1]] = float(found[2]) * (1e-3 if found[3] == "ms" else 1.0)
    return limits


def ttft(record: Record) -> float | None:
    """Seconds from its start, connecting included, to the first text."""
    return record.chunks[0] - record.started if record.chunks else None


def e2e(record: Record) -> float | None:
    """Seconds from its start to the answer's end."""
    return record.finished - record.started if record.finished is not None else None


def tpot(record: Record) -> float | None:
    """Seconds a token after the first: from the first text to the last, over the tokens less one."""
    tokens = output_tokens(record)
    return (record.chunks[-1] - record.chunks[0]) / (tokens - 1) if len(record.chunks) > 1 and tokens > 1 else None


def itl(record: Record) -> list[float]:
    """Seconds between texts that follow each other."""
    return [b - a for a, b in zip(record.chunks, record.chunks[1:], strict=False)]


def output_tokens(record: Record) -> int:
    """As the server's usage says, else one for each chunk with text."""
    return record.usage.completion_tokens if record.usage else len(record.chunks)


def prompt_tokens(record: Record) -> int:
    return record.usage.prompt_tokens if record.usage else record.prompt


def good(record: Record, limits: dict[str, float]) -> bool:
    """Completed within every limit. An answer of one token has no time a token, so it meets that limit."""
    if record.outcome != "completed":
        return False
    values = {"ttft": ttft(record), "tpot": tpot(record), "e2e": e2e(record)}
    if "ttft" in limits and values["ttft"] is None:
        return False
    return all((value := values[name]) is None or value <= limit for name, limit in limits.items())


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 (interpolated linearly) and largest in milliseconds, and how many; None of nothing."""
    if not len(seconds):
        return None
    values = np.asarray(seconds, np.float64) * 1e3  # [count]
    points = dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))
    return {"mean": float(values.mean()), **points, "max": float(values.max()), "count": len(values)}


def summarise(result: Result, limits: dict[str, float]) -> dict[str, Any]:
    """Everything found, ready for JSON. Rates are over the time from the first request's start to the last end."""
    records = result.records
    done = [r for r in records if r.outcome == "completed"]
    outcomes = Counter(r.outcome for r in records)
    begun = min((r.started for r in records if r.started), default=result.start)
    ended = max((r.finished for r in records if r.finished is not None), default=result.end)
    seconds = max(result.end if result.interrupted else ended, begun + 1e-9) - begun
    prompt, output = sum(map(prompt_tokens, done)), sum(map(output_tokens, done))
    found: dict[str, Any] = {
        "interrupted": result.interrupted,
        "seconds": seconds,
        "requests": {
            "planned": result.planned,
            "sent": len(records),
            **{name: outcomes[name] for name in ("completed", "refused", "failed", "unfinished")},
        },
        "errors": errors(records),
        "tokens": {
            "prompt": prompt,
            "cached": sum(r.usage.cached_tokens for r in done if r.usage),
            "output": output,
            "asked": sum(r.new for r in done),
            "short_answers": sum(output_tokens(r) < r.new for r in done),
            "counted_by_chunks": sum(r.usage is None for r in done),
            "without_text": sum(not r.chunks for r in done),
            "per_chunk": output / max(1, sum(len(r.chunks) for r in done)),
        },
        "rates": {
            "requests_per_second": len(done) / seconds,
            "output_tokens_per_second": output / seconds,
            "total_tokens_per_second": (prompt + output) / seconds,
        },
        "latency_ms": latencies(done),
        "client": client(result, seconds),
    }
    if limits:
        met = sum(good(r, limits) for r in records)
        found["goodput"] = {
            "limits_ms": {name: limit * 1e3 for name, limit in limits.items()},
            "good": met,
            "requests_per_second": met / seconds,
            "share": met / max(1, len(records)),
        }
    return found


def latencies(done: Sequence[Record]) -> dict[str, dict[str, float] | None]:
    values = {"ttft": [ttft(r) for r in done], "tpot": [tpot(r) for r in done], "e2e": [e2e(r) for r in done]}
    found = {name: spread([v for v in each if v is not None]) for name, each in values.items()}
    found["itl"] = spread([gap for r in done for gap in itl(r)])
    return {name: found[name] for name in LATENCIES}


def client(result: Result, seconds: float) -> dict[str, Any]:
    """How good the client was: what it did late is not the server's doing."""
    records = result.records
    return {
        "send_lag_ms": spread([r.started - r.scheduled for r in records if r.scheduled is not None and r.started]),
        "loop_lag_ms": spread(result.beats),
        "connect_ms": spread([r.connected - r.started for r in records if r.connected is not None]),
        "cpu_share": result.cpu_seconds / seconds,
        "most_under_way": under_way(records, result.end),
    }


def under_way(records: Sequence[Record], end: float) -> int:
    """The most requests that were unanswered at one time."""
    steps = sorted(
        [(r.started, 1) for r in records] + [(r.finished if r.finished is not None else end, -1) for r in records]
    )
    return int(max(np.cumsum([step for _, step in steps]), default=0)) if steps else 0


def errors(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What went wrong, the most frequent first, each with the words of its first occurrence."""
    counts = Counter((r.outcome, r.error) for r in records if r.error)
    first: dict[tuple[str, str], Record] = {}
    for record in records:
        first.setdefault((record.outcome, record.error), record)
    return [
        {
            "outcome": outcome,
            "error": error,
            "count": count,
            "with_retry_after": sum(
                r.retry_after is not None for r in records if (r.outcome, r.error) == (outcome, error)
            ),
            "first": {"request": first[outcome, error].number, "detail": first[outcome, error].detail},
        }
        for (outcome, error), count in counts.most_common()
    ]
