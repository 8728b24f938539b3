"""The time that a search may take, and what of it each stage gets.

Stages are trimmed by what those before them showed of the model's speed. What was decided is kept with the
measurements: a run that is continued measures what it would have measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from hasten.compress.run import Packer
from hasten.errors import FormatError
from hasten.evaluate import perplexity
from hasten.search import sensitivity
from hasten.search.candidates import Tensor
from hasten.search.job import Job, calibration_tokens
from hasten.search.sensitivity import Plan
from hasten.search.trials import Trials

CALIBRATION, CANDIDATES, SENSITIVITY, SEARCH, PROOF = 0.15, 0.3, 0.4, 0.45, 0.3
"""Shares of the time left when each stage begins."""
SENSITIVITY_SECONDS = 600.0
"""For measuring sensitivities, where the whole has no limit."""
FEWEST_CALIBRATION, FEWEST_SEARCH, FEWEST_FINAL = 1024, 2048, 4096
MEASURED = 8
"""Whole candidates that a search measures, about."""
CORE = ("int8-g64", "int4-g32", "int4-g64", "codebook4-g64")
FEWEST = ("int8-g64", "int4-g64")
"""Formats that are tried where there is no time for all, nor for those."""
SHAPES_SECONDS = 600.0
"""A search that has taken longer than this with the model's own shape does not begin again with another."""
TIMING_SECONDS = 8.0
"""That timing candidates takes about, warming up included, each time."""


def calibration(job: Job, trials: Trials) -> int:
    """Tokens to calibrate on: fewer where a first window shows that all would take too long."""
    most = calibration_tokens(job.graph)
    if not job.clock.limited:
        return most

    def decide() -> int:
        window = job.texts.calibration[0][:256]
        start = time.monotonic()
        perplexity.measure(job.graph, job.original, [window], threads=job.threads, kv_format=job.kv_format)
        each = (time.monotonic() - start) / len(window)
        return int(min(most, max(FEWEST_CALIBRATION, CALIBRATION * job.clock.left() / (2 * each))))

    return int(trials.measure("schedule", ["calibration", job.key, job.settings.minutes], decide))


def trimmed(job: Job, found: Sequence[Tensor], packer: Packer, trials: Trials) -> list[Tensor]:
    """The tensors with as many choices as there is time to pack, judged by one of middling size."""
    if not job.clock.limited or not found:
        return list(found)

    def decide() -> list[str] | None:
        one = sorted(found, key=lambda t: t.parameters)[len(found) // 2]
        scale = sum(t.parameters for t in found) / one.parameters
        took = {}
        for choice in one.choices[1:]:
            start = time.monotonic()
            with contextlib.suppress(FormatError):
                packer.error(one.name, choice)
            took[choice.format] = time.monotonic() - start
        for formats in (None, CORE, FEWEST):
            known = [seconds for format, seconds in took.items() if formats is None or format in formats]
            if scale * sum(known) <= CANDIDATES * job.clock.left():
                break
        return None if formats is None else list(formats)

    kept = trials.measure("schedule", ["candidates", job.key, job.settings.minutes], lambda: [decide()])[0]
    if kept is None:
        return list(found)
    job.say(f"to keep within {job.settings.minutes:g} minutes only {', '.join(kept)} are tried")
    return [replace(t, choices=tuple(c for c in t.choices if c.is_original or c.format in kept)) for t in found]


def shapes(job: Job, trials: Trials) -> bool:
    """Whether other shapes of the model are looked at: where the search was quick so far, and there is time for it."""
    facts = ["shapes", job.key, job.settings.minutes]

    def decide() -> bool:
        took = sum(job.seconds.values())
        return took < min(SHAPES_SECONDS, job.clock.left() / 2)

    return bool(trials.measure("schedule", facts, decide))


def sensitivities(job: Job, found: Sequence[Tensor], each: float, available: int, trials: Trials) -> Plan:
    """What is measured of single matrices, given what the whole model takes for a token."""

    def decide() -> dict[str, object]:
        limit = min(SENSITIVITY_SECONDS, SENSITIVITY * job.clock.left())
        most = 1 if job.shape else len(sensitivity.KINDS)  # the model's own shape has told how kinds compare
        return asdict(sensitivity.plan(job.graph, found, each, limit, available, most))

    if not job.clock.limited:
        return Plan(**decide())  # type: ignore[arg-type]
    plan = trials.measure("schedule", ["sensitivity", job.key, job.settings.minutes], decide)
    return Plan(tuple(plan["kinds"]), plan["tokens"], plan["stride"])


def text_sizes(job: Job, each: float, trials: Trials) -> dict[str, float]:
    """Tokens to search and to prove on: more where the model is quick, for a narrower interval."""
    sizes = {"search": min(max(5 / each, 8192), 32768), "final": min(max(16 / each, 16384), 98304)}
    if not job.clock.limited:
        return sizes

    def decide() -> dict[str, float]:
        left = max(job.clock.left(), 0.0)
        search, final = SEARCH * left / (MEASURED * _passes(job) * each), PROOF * left / (2 * each)
        return {
            "search": min(sizes["search"], max(search, FEWEST_SEARCH)),
            "final": min(sizes["final"], max(final, FEWEST_FINAL)),
        }

    return dict(trials.measure("schedule", ["texts", job.key, job.settings.minutes], decide))


def reserve(job: Job, each: float, final: float) -> float:
    """Seconds that must be left when the search ends: to time candidates, prove one and write it."""
    return 2 * final * each + 2 * TIMING_SECONDS + 2.0


def _passes(job: Job) -> int:
    """Times that a text goes through a model to measure a candidate."""
    return 1 if {b.measure for b in job.budget.parts} <= {"ppl", "task"} else 2


def overrun(job: Job) -> None:
    """Say where the least that can be done took longer than was allowed."""
    if job.clock.left() < -0.1 * job.clock.limit:
        took = (job.clock.limit - job.clock.left()) / 60
        job.say(f"the search took {took:.1f} minutes, of {job.settings.minutes:g} allowed: it cannot do with less here")
