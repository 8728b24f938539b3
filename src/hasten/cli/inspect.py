"""`hasten inspect`: what a model is made of, what it takes to run, and what fusion makes of its graph."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hasten.cli.cache import Cache
from hasten.cli.options import argument, group, option
from hasten.errors import ContextError, InputError

if TYPE_CHECKING:
    from hasten.checkpoint import Model
    from hasten.graph.graph import Graph

HELP = "blocks, shapes, formats, bytes, predicted memory, and the graph"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id, hasten artifact or demo")
    context: int | None = option(
        None, help="predict memory for sequences this long (default: the model's, at most 4096)"
    )
    batch: int = option(1, help="predict memory for this many sequences at once")
    cache: Cache = group(Cache)
    graph: bool = option(False, help="print the graph before and after fusion, and what was fused and why")
    verify: bool = option(False, help="check an artifact's files, weights too, against their hashes first")
    json: bool = option(False, help="print one JSON document")


def run(options: Options) -> None:
    from hasten import checkpoint
    from hasten.checkpoint.artifact import FACTS

    model = checkpoint.open(options.model)
    if options.verify:
        if model.kind != "artifact":
            raise InputError(f"{options.model} is no hasten artifact: it has no hashes to verify")
        checkpoint.verify(model.path)
        print(f"{options.model}: every file is as {FACTS} says", file=sys.stderr)
    document = describe(model, _context(model, options.context), options.batch, options.cache.kv_format)
    if options.graph:
        document["graph"] = graphs(model.graph)
    if options.json:
        print(json.dumps(document, indent=1))
        return
    if options.graph:
        print(f"before fusion:\n{document['graph']['before']}\n\nafter fusion:\n{document['graph']['after']}\n")
    show(document)


def _context(model: Model, context: int | None) -> int:
    from hasten.engine.llm import DEFAULT_CONTEXT

    longest = model.graph.context
    if context is not None and context > longest:
        raise ContextError(
            f"a context of {context} tokens is more than the model's {longest}", f"use {longest} or less"
        )
    if context is not None and context < 1:
        raise InputError(f"context is {context}, must be 1 or more")
    return min(longest, DEFAULT_CONTEXT) if context is None else context


def describe(model: Model, context: int, batch: int, kv_format: str = "auto") -> dict[str, Any]:
    """All that is printed. Sizes in bytes."""
    if batch < 1:
        raise InputError(f"batch is {batch}, must be 1 or more")
    graph = model.graph
    tensors = list(_tensors(graph, model.formats))
    total = sum(t["bytes"] for t in tensors)
    return {
        "model": model.source,
        "model_type": model.config.get("model_type"),
        "kind": model.kind,
        "context": graph.context,
        "vocabulary": graph.vocabulary,
        "hidden": graph.hidden,
        "structure": model.structure.json(),
        "parameters": graph.parameters(),
        "bits_per_weight": 8 * total / graph.parameters(),
        "weight_bytes": total,
        "bytes_on_disk": model.bytes_on_disk,
        "blocks": [[t for t in tensors if t["block"] == i] for i in range(len(graph.blocks))],
        "outside_blocks": [t for t in tensors if t["block"] is None],
        "memory": _memory(model, context, batch, kv_format),
        "notes": list(model.notes),
    }


def _tensors(graph: Graph, stored: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Each tensor once, at its first use, with the block that uses it."""
    from hasten import formats

    seen: set[str] = set()
    for place, node in enumerate(graph.nodes):
        block = next((i for i, b in enumerate(graph.blocks) if b.start <= place < b.stop), None)
        for name in node.weights:
            if name in seen:
                continue
            seen.add(name)
            shape = graph.weights[name].shape
            format = stored.get(name, "f32")
            size = formats.get(format).nbytes(*shape) if len(shape) == 2 else 4 * shape[0]
            count = shape[0] * (shape[1] if len(shape) == 2 else 1)
            yield {
                "name": name,
                "block": block,
                "shape": list(shape),
                "format": format,
                "bits": 8 * size / count,
                "bytes": size,
            }


def _memory(model: Model, context: int, batch: int, kv_format: str) -> dict[str, Any]:
    from hasten.backends.batch import Limits
    from hasten.engine import memory
    from hasten.engine.llm import STEP_TOKENS

    blocks = batch * -(-context // Limits.block_size)
    limits = Limits(
        context=context,
        max_tokens=max(STEP_TOKENS, batch),
        max_sequences=batch,
        max_rows=batch,
        kv_blocks=blocks,
        kv_format=memory.kv_format(model.formats.values(), kv_format, model.kv_formats),
    )
    found = memory.predict(model.graph, memory.weight_bytes(model.graph, model.formats), limits, model.formats)
    return {
        "context": context,
        "batch": batch,
        "kv_format": limits.kv_format,
        **asdict(found),
        "total": found.total,
        "available": memory.memory()[1],
    }


def graphs(graph: Graph) -> dict[str, str]:
    """The graph before and after fusion, as text."""
    from hasten.graph.fuse import fuse
    from hasten.graph.show import describe

    return {"before": describe(graph), "after": describe(fuse(graph))}


def show(document: dict[str, Any]) -> None:
    from hasten.engine.memory import shown_format, size

    facts = f"context {document['context']}, vocabulary {document['vocabulary']}, hidden {document['hidden']}"
    print(f"{document['model']}: {document['model_type']}, {len(document['blocks'])} blocks, {facts}")
    bits = f"{document['bits_per_weight']:.2f} bits each"
    print(f"{document['parameters']:,} parameters, {bits}, {size(document['bytes_on_disk'])} on disk\n")
    departures = list(_departures(document["structure"]))
    if departures:
        print(f"departs from its config.json: {'; '.join(departures)}\n")
    rows = list(_rows(document))
    width = max(len(row[0]) for row in rows)
    for name, shape, format, bits, bytes in rows:
        print(f"{name:<{width}}  {shape:>14}  {format:<15} {bits:>6}  {bytes:>10}".rstrip())
    memory = document["memory"]
    parts = " + ".join(f"{size(memory[part])} {part.replace('_', ' ')}" for part in ("weights", "kv_cache", "buffers"))
    print(f"\nmemory for {memory['batch']} x {memory['context']} tokens, cache in {shown_format(memory['kv_format'])}:")
    known = "" if memory["available"] is None else f", of {size(memory['available'])} available"
    print(f"{parts} = {size(memory['total'])}{known}")
    for note in document["notes"]:
        print(f"note: {note}")


def _rows(document: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Lines of the table; neighbouring blocks that are alike are shown once."""
    from hasten.engine.memory import size

    def line(tensor: dict[str, Any]) -> tuple[str, str, str, str, str]:
        shape = " x ".join(map(str, tensor["shape"]))
        return tensor["name"], shape, tensor["format"], f"{tensor['bits']:.2f}", size(tensor["bytes"])

    yield "tensor", "shape", "format", "bits", "size"
    yield from (line(t) for t in document["outside_blocks"])
    blocks, dropped, first = document["blocks"], document["structure"]["dropped"], 0
    numbers = [i for i in range(len(blocks) + len(dropped)) if i not in dropped]
    while first < len(blocks):
        last = first
        while last + 1 < len(blocks) and _anonymous(blocks[last + 1]) == _anonymous(blocks[first]):
            last += 1
        named = f"{numbers[first]} to {numbers[last]}"
        title = f"block {numbers[first]}" if first == last else f"blocks {named}, alike"
        yield f"-- {title}, {size(sum(t['bytes'] for t in blocks[first]))} each", "", "", "", ""
        yield from (line(t) for t in blocks[first])
        first = last + 1


def _anonymous(block: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(re.sub(r"\.\d+\.", ".N.", t["name"]), tuple(t["shape"]), t["format"]) for t in block]


def _departures(structure: dict[str, Any]) -> Iterator[str]:
    """In words, what `structure` says."""
    dropped, narrowed, low_rank = structure["dropped"], structure["narrowed"], structure["low_rank"]
    if dropped:
        yield f"block{'s' if len(dropped) > 1 else ''} {', '.join(map(str, dropped))} dropped"
    if narrowed:
        yield f"{len(narrowed)} block{'s' if len(narrowed) > 1 else ''} narrowed"
    beside = sum(entry["residual"] for entry in low_rank.values())
    for count, how in ((len(low_rank) - beside, "of low rank"), (beside, "with a low-rank correction")):
        if count:
            yield f"{count} matri{'ces' if count > 1 else 'x'} {how}"
