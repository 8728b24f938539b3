"""The memory that a user allows: what is left of it for matrices, beside the cache and the buffers of serving."""

from __future__ import annotations

from hasten.backends.batch import Limits
from hasten.backends.cache import KvFormat
from hasten.engine import memory
from hasten.engine.llm import STEP_TOKENS
from hasten.engine.memory import size
from hasten.errors import MemoryLimitError
from hasten.search.candidates import nbytes, tensors
from hasten.search.job import Job

BLOCK = 32
LEAST = "int4"
"""The smallest format of a cache."""


def serving(job: Job, kv_format: KvFormat | None = None) -> memory.Prediction:
    """What serving takes beside the matrices: vectors, a cache (of candidates, unless said), and buffers.

    The cache holds as many sequences as the objective has, of the lengths that were given, or one whole context.
    """
    aim, stated = job.objective, job.settings.lengths or job.settings.trace
    context = aim.prompt + aim.new if stated else job.graph.context
    limits = Limits(
        context=context,
        max_tokens=max(STEP_TOKENS, aim.batch),
        max_sequences=aim.batch,
        max_rows=aim.batch,
        block_size=BLOCK,
        kv_blocks=-(-context // BLOCK) * aim.batch,
        kv_format=kv_format or (job.kv_format if job.cache == "auto" else job.cache),
        threads=job.threads,
    )
    vectors = sum(4 * spec.shape[0] for spec in job.graph.weights.values() if not spec.is_matrix)
    return memory.predict(job.graph, vectors, limits)


def check(job: Job) -> None:
    """Raises MemoryLimitError where no choice of formats, the cache's included, keeps the cap."""
    cap = job.objective.cap
    if cap is None:
        return
    beside, found = serving(job, LEAST), tensors(job.graph, job.original)
    least = sum(min(nbytes(t, c) for c in t.choices) for t in found)
    if least + beside.total > cap:
        raise MemoryLimitError(
            f"the memory cap is {size(cap)}; the least that any choice of formats takes is "
            f"{size(least + beside.total)} "
            f"(matrices {size(least)}, cache {size(beside.kv_cache)}, buffers {size(beside.buffers)})",
            "a larger --memory-cap, or shorter --lengths or a smaller --batch for a smaller cache",
        )
    whole = sum(nbytes(t, t.choices[0]) for t in found) + serving(job).total
    job.original_allowed = whole <= cap
    if not job.original_allowed:
        job.say(f"the original takes {size(whole)}, more than the memory cap of {size(cap)}: it is no choice here")
