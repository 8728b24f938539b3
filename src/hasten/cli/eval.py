"""`hasten eval`: perplexity on a text, and the distance to another model, through the program that serves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.cli.cache import Cache
from hasten.cli.options import argument, group, option, required
from hasten.cli.progress import reporter
from hasten.errors import InputError

if TYPE_CHECKING:
    from hasten.backends.batch import Int32
    from hasten.checkpoint import Model
    from hasten.evaluate.perplexity import Evaluation

HELP = "perplexity on a text, and how far a model is from another"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id, hasten artifact or demo")
    data: Path = required(help="UTF-8 text to score", metavar="FILE")
    context: int | None = option(
        None, help="tokens in a window (default: the model's context, at most 1024)", metavar="N"
    )
    reference: str | None = option(None, help="also the divergence from this model, token by token", metavar="MODEL")
    cache: Cache = group(Cache)
    threads: int = option(0, help="0: one a core")
    json: bool = option(False, help="print one JSON document")


def run(options: Options) -> None:
    from hasten import checkpoint
    from hasten.evaluate import text

    written = text.read(options.data)
    model = checkpoint.open(options.model)
    reference = checkpoint.open(options.reference) if options.reference else None
    context = text.window_size(options.context, min(m.graph.context for m in (model, reference) if m))
    windows = text.windows(model.tokenizer, written, context)
    if reference:
        _same_tokens(windows, text.windows(reference.tokenizer, written, context))
    found = _measure(model, reference, windows, context, options)
    if options.json:
        print(json.dumps(found.summary()))
    else:
        show(found)


def _measure(model: Model, reference: Model | None, windows: list[Int32], context: int, options: Options) -> Evaluation:
    from hasten.engine import memory
    from hasten.evaluate import perplexity

    opened = [m.at_context(context) for m in (model, reference) if m]
    own, other = (
        memory.kv_format(m.formats.values(), asked, m.kv_formats) if m else "auto"
        for m, asked in ((model, options.cache.kv_format), (reference, "auto"))
    )
    needed = perplexity.predict([(m.graph, m.formats) for m in opened], windows, own, other)
    memory.require(needed, memory.memory()[1])
    with reporter() as report:
        loaded = [(m.graph, m.weights(report)) for m in opened]
        return perplexity.measure(
            *loaded[0],
            windows,
            reference=loaded[1] if reference else None,
            kv_format=own,
            reference_kv_format=other,
            threads=options.threads,
            report=report,
        )


def _same_tokens(own: list[Int32], other: list[Int32]) -> None:
    if [w.tolist() for w in own] != [w.tolist() for w in other]:
        raise InputError(
            "the two models' tokenizers cut this text differently", "compare models that share a tokenizer"
        )


def show(found: Evaluation) -> None:
    interval = f"   95%: {found.ci95[0]:.4f} to {found.ci95[1]:.4f}" if found.ci95 else ""
    print(f"perplexity      {found.perplexity:.4f}{interval}")
    print(f"tokens          {found.tokens}")
    if (ratio := found.ratio) and math.isfinite(ratio.high):
        low, middle, high = (f"{100 * (x - 1):+.2f}%" for x in (ratio.low, ratio.estimate, ratio.high))
        print(f"growth          {middle}   95%: {low} to {high}, over the reference's perplexity")
    if found.kl_divergence is not None and found.top1_agreement is not None:
        print(f"kl divergence   {found.kl_divergence:.6f} nats a token, to the reference")
        print(f"top-1 agreement {100 * found.top1_agreement:.2f}%")
