"""`hasten compress`: a model packed as a recipe says, without a search."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.cli.options import argument, option, required
from hasten.cli.progress import reporter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hasten.checkpoint import Model
    from hasten.compress.recipe import Choice
    from hasten.engine.memory import Prediction

HELP = "pack a model's matrices as a recipe says"
CALIBRATION_TOKENS = 16384


@dataclass(frozen=True)
class Options:
    model: str = argument(help="a Hugging Face directory, a hub id, a hasten artifact, or demo")
    output: Path = required("-o", help="directory to write; must not exist", metavar="OUT")
    recipe: Path = required(help="YAML: patterns of tensor names to format and method", metavar="FILE")
    calibration: Path | None = option(None, help="text to gather statistics on", metavar="FILE")
    threads: int = option(0, help="threads to use; 0: all that this process may")
    json: bool = option(False, help="print the result as JSON")


def run(options: Options) -> int:
    from hasten import checkpoint
    from hasten.compress import calibrate, recipe
    from hasten.compress.run import Packer, needs_moments
    from hasten.engine import memory
    from hasten.engine.llm import DEFAULT_CONTEXT
    from hasten.search import document, texts

    wanted = recipe.read(options.recipe)
    checkpoint.check_output(options.output)
    model = checkpoint.open(options.model)
    model = model.at_context(min(model.graph.context, DEFAULT_CONTEXT))  # as it is served: rope may depend on it
    choices = wanted.assign([m.name for m in model.graph.matrices()])
    memory.require(predict(model, choices), memory.memory()[1])
    with reporter() as report:
        original = model.weights(report)
        moments = {}
        if needs_moments(choices):
            most = CALIBRATION_TOKENS
            windows, source = texts.calibration_windows(model.tokenizer, model.graph.context, options.calibration, most)
            if options.calibration is None and options.model != "demo":
                print(f"note: calibrated on {source}; --calibration FILE takes another text", file=sys.stderr)
            found = calibrate.calibrate(
                model.graph,
                original,
                windows,
                kv_format=memory.kv_format(model.formats.values(), own=model.kv_formats),
                threads=options.threads,
                report=report,
            )
            moments = found.moments
        weights = Packer(original, model.tensor, moments).model(choices, report)
    written = checkpoint.write_artifact(options.output, model, weights, document.recipe(choices), {})
    before, after = model.bytes_on_disk, sum(f.stat().st_size for f in written.iterdir())
    if options.json:
        formats = {name: weights[name].format.name for name in choices}  # type: ignore[union-attr]
        facts = {"output": str(options.output), "bytes_before": before, "bytes_after": after, "formats": formats}
        print(json_module.dumps(facts, indent=1))
    else:
        print(f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB\nartifact: {options.output}")
    return 0


def predict(model: Model, choices: Mapping[str, Choice]) -> Prediction:
    """What packing takes: the model, the packed matrices, one in the making, and calibration where a method asks it."""
    from hasten import formats
    from hasten.backends import feed
    from hasten.compress import calibrate
    from hasten.compress.run import needs_moments
    from hasten.engine import memory

    graph = model.graph
    shapes = {m.name: m.shape for m in graph.matrices()}
    packed = [formats.get(c.format).nbytes(*shapes[n]) for n, c in choices.items() if not c.is_original]
    weights = memory.weight_bytes(graph, model.formats) + sum(packed)
    working = 4 * 6 * max(rows * columns for rows, columns in shapes.values())
    if not needs_moments(choices):
        return memory.Prediction(weights, 0, working)
    limits = feed.window_limits(
        min(graph.context, 512),
        calibrate.CHUNK,
        kv_format=memory.kv_format(model.formats.values(), own=model.kv_formats),
    )
    step = memory.predict(graph, weights, replace(limits, max_rows=1))
    hidden = 3 * 4 * CALIBRATION_TOKENS * graph.hidden
    return memory.Prediction(weights, step.kv_cache, max(step.buffers + hidden, working))
