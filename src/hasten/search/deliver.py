"""What a search found goes to disk: the artifact with its report, read back and compared, then put into its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hasten import checkpoint
from hasten.backends import cache
from hasten.bench import peak
from hasten.compress.run import Packer
from hasten.errors import BackendError, CheckpointError, OutputError
from hasten.evaluate import perplexity
from hasten.search import document, report, schedule
from hasten.search.cost import Site
from hasten.search.evidence import Evidence
from hasten.search.job import Job
from hasten.search.prove import Proof
from hasten.search.refine import Refiner, Tried


def write(
    job: Job,
    packer: Packer,
    proof: Proof,
    chosen: Tried,
    refiner: Refiner,
    times: dict[Site, float],
    told: Evidence,
    staging: Path,
) -> dict[str, Any]:
    """The artifact with its report, in `staging`; returns the report's document."""
    shutil.rmtree(staging, ignore_errors=True)
    weights = packer.model(chosen.choices)
    before, after = proof.final[chosen.name]
    measurements = {"budget": str(job.budget), **proof.attempts[-1].figures}
    recipe = document.recipe(chosen.choices, (job.shape or {}).get("recipe"), job.cache)
    with job.stage("writing"):
        checkpoint.write_artifact(
            staging,
            job.model,
            weights,
            recipe,
            measurements,
            () if job.kv_formats[1] == "auto" else cache.formats_of(job.graph, job.kv_formats[1]),
        )
        verify(job, staging, weights)
    with job.stage("memory"):
        peaks = peak_memory(job, staging)
    schedule.overrun(job)
    made = document.make(job, refiner, proof, times, document.Final(before, after, peaks, size(staging)), told)
    report.write(staging, made, recipe)
    return made


def verify(job: Job, staging: Path, weights: Any) -> None:
    """What was written must speak like what was measured: the same log-probabilities, bit for bit."""
    windows = [job.texts.search[0][:256]]
    loaded = checkpoint.open(str(staging)).at_context(job.graph.context)
    pair = [
        perplexity.measure(graph, own, windows, threads=job.threads, kv_format=kv or "auto").logprobs[0]
        for graph, own, kv in (
            (job.graph, weights, job.kv_formats[1]),
            (loaded.graph, loaded.weights(), loaded.kv_formats),
        )
    ]
    if not np.array_equal(pair[0], pair[1]):
        raise CheckpointError("the artifact read back differs from what was measured", "please report this fault")


def peak_memory(job: Job, staging: Path) -> tuple[int | None, int | None]:
    """Of original and artifact, each served in a process of its own."""
    prompt, new = job.objective.prompt, job.objective.new
    found: list[int | None] = []
    for done, source in enumerate((job.settings.model, str(staging))):
        job.report("measuring memory", done, 2)
        try:
            found.append(peak.peak_memory(source, prompt=prompt, new=min(new, 8), threads=job.threads))
        except BackendError as error:
            job.say(error.message)
            found.append(None)
    return found[0], found[1]


def place(staging: Path, output: Path) -> None:
    """Into its place in one step."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        os.rename(staging, output)
    except OSError as error:
        raise OutputError(f"cannot put the artifact at {output}: {error.strerror}", f"it lies at {staging}") from None


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())
