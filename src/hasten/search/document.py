"""Everything a search found, as one JSON document: what report.json holds, `--json` prints and the reports show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hasten.bench.latency import Run
from hasten.compress.recipe import Choice
from hasten.formats import get
from hasten.search import speed
from hasten.search.budget import SHOWN
from hasten.search.candidates import Tensor, nbytes
from hasten.search.cost import Site
from hasten.search.job import Job
from hasten.search.prove import Proof
from hasten.search.quality import Readings, finite
from hasten.search.refine import Refiner, Tried
from hasten.search.speed import Speed

Json = dict[str, Any]


@dataclass(frozen=True)
class Final:
    """Measured on the finished artifact, beside the original."""

    before: Run
    after: Speed
    peak_memory: tuple[int | None, int | None]
    bytes_on_disk: int


def make(job: Job, refiner: Refiner, proof: Proof, times: Mapping[Site, float], final: Final | None) -> Json:
    settings = job.settings
    chosen = proof.chosen
    document: Json = {
        "model": settings.model,
        "architecture": str(job.model.config.get("model_type", "")),
        "parameters": job.graph.parameters(),
        "output": str(settings.output) if chosen else None,
        "objective": job.objective.name,
        "aim": {
            **asdict(job.objective),
            "target": str(job.objective.target) if job.objective.target else None,
            "unit": job.objective.unit,
        },
        "budget": budget(job),
        "verdict": verdict(job, proof),
        "machine": {**asdict(job.machine), "threads": job.threads},
        "before": None,
        "after": None,
        "speedup": None,
        "tensors": [tensor(t, refiner, i, chosen) for i, t in enumerate(refiner.space.tensors)],
        "kernels": [{**asdict(site), "shape": list(site.shape), "seconds": seconds} for site, seconds in times.items()],
        "candidates": [candidate(job, t, proof, refiner) for t in refiner.tried],
        "refused": refused(refiner, times),
        "texts": {
            name: {"source": job.texts.sources[name], "tokens": sum(len(w) for w in getattr(job.texts, name))}
            for name in ("calibration", "search", "final")
        },
        "seen": job.texts.seen,
        "context": job.texts.context,
        "notes": job.notes,
        "seconds": {name: round(s, 2) for name, s in job.seconds.items()},
    }
    if final and chosen:
        document |= before_and_after(job, refiner, proof, final)
    return document


def budget(job: Job) -> Json:
    """All of it in words, its first part's measure and limit, and every part. No limit is null."""
    parts = [{"text": str(b), "measure": b.measure, "limit": finite(b.limit), "what": b.what} for b in job.budget.parts]
    return {**parts[0], "text": str(job.budget), "parts": parts}


def verdict(job: Job, proof: Proof) -> Json:
    return {
        "holds": proof.chosen is not None,
        "reason": proof.reason or None,
        "limit": finite(job.budget.first.limit),
        "attempts": [
            {
                "candidate": a.name,
                "holds": a.holds,
                **a.reading.json(),
                "readings": parts(job, a.readings),
                **a.figures,
            }
            for a in proof.attempts
        ],
    }


def parts(job: Job, readings: Readings) -> list[Json]:
    """The reading of each part of the budget."""
    return [
        {"budget": str(b), "measure": b.measure, "holds": r.within(b), **r.json()}
        for b, r in zip(job.budget.parts, readings, strict=True)
    ]


def before_and_after(job: Job, refiner: Refiner, proof: Proof, final: Final) -> Json:
    assert proof.chosen is not None
    figures = proof.attempts[-1].figures
    original = {t.name: t.choices[0] for t in refiner.space.tensors}
    parameters = sum(t.parameters for t in refiner.space.tensors)
    machine = final.after.run.limits

    def side(name: str, run: Run, disk: int, memory: int | None, choices: Mapping[str, Choice]) -> Json:
        speeds = asdict(run)
        speeds.pop("limits")
        return {
            **figures[name],
            "kl_divergence": 0.0 if name == "before" else figures["kl_divergence"],
            "top1_agreement": 1.0 if name == "before" else figures["top1_agreement"],
            **speeds,
            "rate": speed.rate(run, job.objective),
            "bytes_on_disk": disk,
            "peak_memory": memory,
            "bits_per_weight": 8 * refiner.space.bytes(choices) / parameters,
        }

    aim, gains = job.objective, {"decode": final.after.decode, "prefill": final.after.prefill}
    if final.after.together:
        gains["throughput"] = final.after.together
    return {
        "before": side("before", final.before, job.model.bytes_on_disk, final.peak_memory[0], original),
        "after": side("after", final.after.run, final.bytes_on_disk, final.peak_memory[1], proof.chosen.choices),
        "speedup": {name: asdict(gain) for name, gain in gains.items()},
        "timed": {"prompt": aim.prompt, "new": aim.new, "batch": aim.batch},
        "limits": asdict(machine),
    }


def tensor(one: Tensor, refiner: Refiner, index: int, chosen: Tried | None) -> Json:
    """A matrix, what became of it, and what each of its choices would have cost and lost."""
    pick = chosen.choices[one.name] if chosen else one.choices[0]
    costs, losses = refiner.space.costs[index], refiner.space.losses[index]
    format = get(one.format if pick.is_original else pick.format)
    return {
        "name": one.name,
        "role": one.role,
        "block": one.block,
        "shape": list(one.shape),
        "original": one.format,
        "format": format.name,
        "method": pick.method,
        "bits": format.bits_per_weight(*one.shape),
        "bytes": nbytes(one, pick),
        "choices": [
            {
                "format": one.format if c.is_original else c.format,
                "method": c.method,
                "cost": cost,
                "bytes": nbytes(one, c),
                "loss": None if loss == float("inf") else loss,
            }
            for c, cost, loss in zip(one.choices, costs, losses, strict=True)
        ],
    }


def candidate(job: Job, tried: Tried, proof: Proof, refiner: Refiner) -> Json:
    """A whole candidate as it was measured on the search's text."""
    timed = proof.speeds.get(tried.name)
    return {
        "name": tried.name,
        "chosen": proof.chosen is not None and proof.chosen.choices == tried.choices,
        "fits": tried.fits,
        "allowance": tried.allowance,
        **tried.reading.json(),
        "readings": parts(job, tried.readings),
        "recipe": summary(tried.choices),
        "cost": tried.cost,
        "cost_of_original": refiner.space.cost(refiner.space.original),
        "bytes": tried.bytes,
        "speedup": {"decode": asdict(timed.decode), "prefill": asdict(timed.prefill)} if timed else None,
        "rate": speed.rate(timed.run, job.objective) if timed and timed.run else None,
    }


def summary(choices: Mapping[str, Choice]) -> str:
    """A recipe in a line: how many matrices get which format by which method."""
    counts = Counter("as it was" if c.is_original else f"{c.format} by {c.method}" for c in choices.values())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def refused(refiner: Refiner, times: Mapping[Site, float]) -> list[Json]:
    """Formats that were no faster than the original's at some shape, with both times in seconds."""
    found: dict[tuple[tuple[int, int], str], Json] = {}
    for one in refiner.space.tensors:
        for choice in one.choices[1:]:
            sites = [s for s in times if s.shape == one.shape and s.format == choice.format]
            for site in sites:
                own = times.get(Site(one.shape, one.format, site.tokens))
                if own is not None and times[site] >= own:
                    facts = {"shape": list(one.shape), "format": choice.format, "tokens": site.tokens}
                    found[one.shape, choice.format] = {
                        **facts,
                        "seconds": times[site],
                        "original": one.format,
                        "original_seconds": own,
                    }
    return list(found.values())


def recipe(choices: Mapping[str, Choice]) -> Json:
    """Choices as the recipe that `hasten compress` would take."""
    return {"tensors": [{"match": n, "format": c.format, "method": c.method} for n, c in choices.items()]}


# --- the table that every report shows

Row = tuple[str, str, str, str]


def rows(document: Json) -> list[Row]:
    """(what, original, accelerated, change) of the before-and-after table."""
    before, after, gain = document["before"], document["after"], document["speedup"]
    proof = document["verdict"]["attempts"][-1]
    held = {part["measure"]: _loss(document, part, reading) for part, reading in _readings(document, proof)}
    ratio = f"{(after['perplexity'] / before['perplexity'] - 1) * 100:+.2f}%"
    speeds = [
        (
            "prefill, tokens/s (share of limit)",
            _rate(before, "prefill"),
            _rate(after, "prefill"),
            _gain(gain["prefill"]),
        ),
        ("decode, tokens/s (share of limit)", _rate(before, "decode"), _rate(after, "decode"), _gain(gain["decode"])),
    ]
    if document["objective"] == "throughput":
        speeds.append(("both in turn", "", "", _gain(gain["throughput"])))
    return [
        (
            "perplexity (95% interval)",
            _interval(before["perplexity"], before["ci95"]),
            _interval(after["perplexity"], after["ci95"]),
            held.get("ppl", ratio),
        ),
        ("KL divergence to the original, nats", "0", f"{after['kl_divergence']:.4f}", held.get("kl", "")),
        ("top-1 agreement with the original", "100%", f"{after['top1_agreement'] * 100:.1f}%", ""),
        *(
            (
                f"accuracy on {path.rsplit('/')[-1]}, {found['questions']:,} questions",
                f"{found['before']:.1%}",
                f"{found['after']:.1%}",
                f"{(found['after'] - found['before']) * 100:+.1f} points",
            )
            for path, found in proof.get("tasks", {}).items()
        ),
        *speeds,
        (
            "time to first token, ms (share of limit)",
            _first_token(before),
            _first_token(after),
            f"{before['ttft_ms'] / after['ttft_ms']:.2f}x",
        ),
        ("size on disk", *_sizes(before["bytes_on_disk"], after["bytes_on_disk"])),
        ("peak memory", *_sizes(before["peak_memory"], after["peak_memory"])),
        (
            "bits per weight",
            f"{before['bits_per_weight']:.2f}",
            f"{after['bits_per_weight']:.2f}",
            f"{after['bits_per_weight'] / before['bits_per_weight']:.2f}x",
        ),
    ]


def _readings(document: Json, attempt: Json) -> list[tuple[Json, Json]]:
    """Each part of the budget with its reading."""
    return list(zip(document["budget"]["parts"], attempt["readings"], strict=True))


def _interval(value: float, ci95: list[float]) -> str:
    return f"{value:.3f} ({ci95[0]:.3f} to {ci95[1]:.3f})"


def loss(measure: str, value: float | None, unit: bool = True) -> str:
    """A loss in its measure's unit."""
    factor, name, digits = SHOWN[measure]
    if value is None:
        return "not a number"
    return f"{value * factor:{'+' if measure == 'ppl' else ''}.{digits}f}{name if unit else ''}"


def _loss(document: Json, part: Json, reading: Json) -> str:
    level = "" if reading["level"] == 0.95 else f", {reading['level']:.0%} interval"
    ends = [loss(part["measure"], reading[end], unit=False) for end in ("low", "high")]
    shown = loss(part["measure"], reading["estimate"], unit=part["measure"] != "kl")
    return f"{shown} ({ends[0]} to {ends[1]}{level})"


def _rate(side: Json, part: str) -> str:
    return f"{side[f'{part}_tokens_per_second']:,.0f} ({side[f'{part}_share_of_limit'] * 100:.0f}%)"


def _first_token(side: Json) -> str:
    return f"{side['ttft_ms']:,.1f} ({side['ttft_share_of_limit'] * 100:.0f}%)"


def _gain(gain: Json) -> str:
    return f"{gain['estimate']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f})"


def _sizes(before: int | None, after: int | None) -> tuple[str, str, str]:
    texts = [f"{n / 1e6:,.1f} MB" if n else "not measured" for n in (before, after)]
    return texts[0], texts[1], f"{after / before:.2f}x" if before and after else ""


def headline(document: Json) -> str:
    """The outcome in a sentence."""
    if document["after"] is None:
        return str(document["verdict"]["reason"])
    proof, part = document["verdict"]["attempts"][-1], document["objective"]
    part = part if part in document["speedup"] else "decode"
    gain = f"{document['speedup'][part]['estimate']:.2f} times the {part} speed"
    size = document["after"]["bytes_on_disk"] / document["before"]["bytes_on_disk"]
    told = [
        f"{one['what']} {_loss(document, one, reading)} on {reading['tokens']:,} held-out "
        f"{'questions' if one['measure'] == 'task' else 'tokens'}"
        + (f" (at most {loss(one['measure'], reading['high'])})" if one["limit"] is not None else "")
        for one, reading in _readings(document, proof)
    ]
    first = f"{gain} at {size:.0%} of the size; {'; '.join(told)}"
    if document["aim"]["target"]:
        reached = document["after"]["rate"]
        first += f": it makes {reached:,.1f} tokens a second, the target is {document['aim']['target']}"
    if document["budget"]["limit"] is None:
        return first
    level = f"the {proof['level']:.0%} interval"
    return f"{first}: the budget {document['budget']['text']} holds at the upper end of {level}"
