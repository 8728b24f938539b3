"""At which batch size a choice turns slower than the original: both with the real programs, in turn."""

from __future__ import annotations

from typing import Any

from hasten.bench import latency
from hasten.compress.calibrate import Weights
from hasten.errors import MemoryLimitError
from hasten.search import speed
from hasten.search.job import Job

SIZES = (1, 4, 16, 64)
PROMPT, NEW, ROUNDS = 32, 16, 3
MOST_SECONDS = 90.0
PASSES = 16
"""Times that a batch's tokens go through the models, warming up included."""
Json = dict[str, Any]


def measure(job: Job, weights: Weights, each: float) -> list[Json]:
    """A row for each batch size that there is time and memory for."""
    prompt = max(1, min(PROMPT, job.graph.context // 2))
    new = max(1, min(NEW, job.graph.context - prompt))
    most = min(MOST_SECONDS, job.clock.left())
    sizes = [n for n in SIZES if 2 * PASSES * n * (prompt + new) * each < most]
    while sizes:
        try:
            subjects = [
                latency.Loaded(graph, own, prompt=prompt, new=new, batch=max(sizes), threads=job.threads, kv_format=kv)
                for (graph, own), kv in zip((job.reference, (job.graph, weights)), job.kv_formats, strict=True)
            ]
            break
        except MemoryLimitError:
            sizes.pop()
    else:
        return []
    timed = latency.time_in_turn(subjects, sizes, threads=job.threads, rounds=ROUNDS, progress=job.report)
    rows = []
    for size, (runs, times) in zip(sizes, timed, strict=True):
        gains = {part: speed.gain(times[0], times[1], part) for part in ("decode", "prefill")}
        rows.append(
            {
                "batch": size,
                "prompt": prompt,
                "new": new,
                **{f"{part}_gain": vars(gain) for part, gain in gains.items()},
                "decode_tokens_per_second": [r.decode_tokens_per_second for r in runs],
                "prefill_tokens_per_second": [r.prefill_tokens_per_second for r in runs],
            }
        )
    return rows


def turning(rows: list[Json]) -> str:
    """In words: from which batch size on the candidate is slower."""
    if not rows:
        return ""
    sizes = ", ".join(str(r["batch"]) for r in rows)
    slower = [r["batch"] for r in rows if r["decode_gain"]["high"] < 1]
    doubtful = [r["batch"] for r in rows if r["decode_gain"]["low"] < 1 <= r["decode_gain"]["high"]]
    if slower:
        return f"Decoding is slower than the original's from batch {slower[0]} on (measured at {sizes})."
    if doubtful:
        return f"Decoding is not certainly faster than the original's at batch {doubtful[0]} (measured at {sizes})."
    return f"Decoding is faster than the original's at every batch size measured ({sizes})."
