"""Everything a search found, as one JSON document: what report.json holds, `--json` prints and the reports show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hasten.backends.cache import KvFormat
from hasten.bench.latency import Run
from hasten.compress.recipe import Choice
from hasten.formats import get
from hasten.search import speed
from hasten.search.candidates import Tensor, nbytes
from hasten.search.cost import Site
from hasten.search.evidence import Evidence
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


def make(
    job: Job,
    refiner: Refiner,
    proof: Proof,
    times: Mapping[Site, float],
    final: Final | None,
    evidence: Evidence | None = None,
) -> Json:
    settings = job.settings
    chosen = proof.chosen
    document: Json = {
        "model": settings.model,
        "architecture": str(job.model.config.get("model_type", "")),
        "parameters": job.reference[0].parameters(),
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
        "others": [told for told, _ in job.others],
        "refused": refused(refiner, times),
        **asdict(evidence or Evidence()),
        "peers": job.peers,
        "texts": {
            name: {"source": job.texts.sources[name], "tokens": sum(len(w) for w in getattr(job.texts, name))}
            for name in ("calibration", "search", "final")
        },
        "cache": job.caches,
        "shape": job.shape,
        "shapes": job.shapes,
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
    parameters = sum(s.shape[0] * s.shape[1] for s in job.reference[0].matrices())
    machine = final.after.run.limits

    def side(name: str, run: Run, disk: int, memory: int | None, matrices: int) -> Json:
        speeds = asdict(run)
        speeds.pop("limits")
        return {
            **figures[name],
            "kl_divergence": 0.0 if name == "before" else figures["kl_divergence"],
            "top1_agreement": 1.0 if name == "before" else figures["top1_agreement"],
            **speeds,
            "rate": speed.rate(run, job.objective),
            "matrix_bytes": matrices,
            "bytes_on_disk": disk,
            "peak_memory": memory,
            "bits_per_weight": 8 * matrices / parameters,
        }

    aim, gains = job.objective, {"decode": final.after.decode, "prefill": final.after.prefill}
    if final.after.together:
        gains["throughput"] = final.after.together
    return {
        "before": side(
            "before", final.before, job.given.bytes_on_disk, final.peak_memory[0], refiner.space.original_bytes
        ),
        "after": side("after", final.after.run, final.bytes_on_disk, final.peak_memory[1], proof.chosen.bytes),
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
        "structure": (job.shape or {}).get("recipe"),
        "cache": None if job.cache == "auto" else job.cache,
        "cost": tried.cost,
        "cost_of_original": refiner.space.original_cost,
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


def recipe(
    choices: Mapping[str, Choice], structure: Mapping[str, Any] | None = None, kv_format: KvFormat = "auto"
) -> Json:
    """Choices, the shape they are of, and the cache's formats, as the recipe that `hasten compress` would take."""
    shape: Json = {"structure": dict(structure)} if structure else {}
    if kv_format != "auto":
        shape["cache"] = kv_format if isinstance(kv_format, str) else list(kv_format)
    return {**shape, "tensors": [{"match": n, "format": c.format, "method": c.method} for n, c in choices.items()]}
