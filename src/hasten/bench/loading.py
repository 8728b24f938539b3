"""A model made ready to be timed, its own weights or random ones."""

from __future__ import annotations

from typing import Any

from hasten import checkpoint, formats
from hasten.backends.cache import KvFormat
from hasten.bench import latency
from hasten.bench.latency import Loaded, Progress, limits_for
from hasten.engine import memory
from hasten.engine.llm import DEFAULT_CONTEXT
from hasten.errors import InputError


def check_format(format: str | None, random_weights: bool) -> None:
    """Raises InputError where `format` is unknown, or given for a model with weights of its own."""
    if format and not random_weights:
        raise InputError(
            "--format goes with --random-weights: a model's own weights have their formats",
            "hasten compress and hasten accelerate change them",
        )
    if format:
        formats.get(format)


def load(
    source: str,
    *,
    random_weights: bool = False,
    format: str | None = None,
    prompt: int,
    new: int,
    batch: int,
    threads: int = 0,
    kv_format: KvFormat = "auto",
    progress: Progress | None = None,
) -> tuple[Loaded, dict[str, Any]]:
    """The model at `source` as it is served, with its weights; random ones of `format` (default: the model's dtype).

    Raises MemoryLimitError before any weight is read where it does not fit, and what opening a model and Loaded raise.
    """
    model = checkpoint.open(source, weights=not random_weights)
    context = max(DEFAULT_CONTEXT, prompt + new)
    model = model.at_context(min(model.graph.context, context))  # as it is served: rope may depend on it
    name = format or model.dtype
    stored = {s.name: name for s in model.graph.matrices()} if random_weights else model.formats
    sizes = {"prompt": prompt, "new": new, "batch": batch, "threads": threads}
    kv_format = memory.kv_format(stored.values(), kv_format, model.kv_formats)
    limits = limits_for(model.graph, kv_format=kv_format, **sizes)
    taken = memory.weight_bytes(model.graph, stored)
    memory.require(memory.predict(model.graph, taken, limits, stored), memory.memory()[1])
    weights = checkpoint.random_weights(model.graph, name) if random_weights else model.weights(progress)
    return latency.load(
        model.graph, weights, [batch], prompt=prompt, new=new, threads=threads, kv_format=kv_format
    ), weights
