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

    from hasten.backends.batch import Float32, Int32
    from hasten.checkpoint import Model
    from hasten.compress.recipe import Choice
    from hasten.compress.restructure import Run
    from hasten.compress.structure_recipe import Plan
    from hasten.engine.memory import Prediction
    from hasten.formats import Weight

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
    from hasten.compress import recipe, restructure
    from hasten.compress.run import needs_moments
    from hasten.engine import memory
    from hasten.engine.llm import DEFAULT_CONTEXT
    from hasten.search import document

    wanted = recipe.read(options.recipe)
    checkpoint.check_output(options.output)
    model = checkpoint.open(options.model)
    model = model.at_context(min(model.graph.context, DEFAULT_CONTEXT))  # as it is served: rope may depend on it
    plan = wanted.structure.plan(model.graph, model.structure) if wanted.structure else None
    choices = wanted.assign(plan.names if plan else [m.name for m in model.graph.matrices()])
    memory.require(predict(model, choices, plan), memory.memory()[1])
    before, kv_format = model.bytes_on_disk, memory.kv_format(model.formats.values())
    made = document.recipe(choices)
    with reporter() as report:
        windows = calibration(options, model) if (plan and plan.calibrated) or needs_moments(choices) else []
        run = restructure.Run(windows, kv_format, options.threads, report)
        if plan and wanted.structure:
            restructure.check(plan, choices)
            model = restructure.apply(model, plan, run)
            made = {"structure": wanted.structure.document, **made}
        weights = pack(model, choices, run)
        if plan and plan.corrected:
            new = {name: choice for name, choice in choices.items() if name not in weights}
            model = restructure.correct(model, weights, plan, run)
            weights = pack(model, new, run)
    written = checkpoint.write_artifact(options.output, model, weights, made, {})
    after = sum(f.stat().st_size for f in written.iterdir())
    if options.json:
        formats = {m.name: weights[m.name].format.name for m in model.graph.matrices()}  # type: ignore[union-attr]
        facts = {"output": str(options.output), "bytes_before": before, "bytes_after": after, "formats": formats}
        print(json_module.dumps(facts, indent=1))
    else:
        print(f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB\nartifact: {options.output}")
    return 0


def calibration(options: Options, model: Model) -> list[Int32]:
    from hasten.search import texts

    most = CALIBRATION_TOKENS
    windows, source = texts.calibration_windows(model.tokenizer, model.graph.context, options.calibration, most)
    if options.calibration is None and options.model != "demo":
        print(f"note: calibrated on {source}; --calibration FILE takes another text", file=sys.stderr)
    return windows


def pack(model: Model, choices: Mapping[str, Choice], run: Run) -> dict[str, Weight | Float32]:
    """All of the model's weights, the chosen ones of its matrices replaced."""
    from hasten.compress import calibrate
    from hasten.compress.run import Packer, needs_moments

    own = {m.name: choices[m.name] for m in model.graph.matrices() if m.name in choices}
    original, moments = model.weights(run.report), {}
    if needs_moments(own):
        found = calibrate.calibrate(
            model.graph, original, run.windows, kv_format=run.kv_format, threads=run.threads, report=run.report
        )
        moments = found.moments
    return Packer(original, model.tensor, moments).model(own, run.report)


def predict(model: Model, choices: Mapping[str, Choice], plan: Plan | None = None) -> Prediction:
    """What packing takes: the model, the packed matrices, one in the making, and calibration where a method asks it."""
    from hasten import formats
    from hasten.backends import feed
    from hasten.compress import calibrate, restructure
    from hasten.compress.run import needs_moments
    from hasten.engine import memory

    graph = model.graph
    shapes = {m.name: m.shape for m in graph.matrices()}
    packed = [formats.get(c.format).nbytes(*shapes[n]) for n, c in choices.items() if not c.is_original and n in shapes]
    weights = memory.weight_bytes(graph, model.formats) + sum(packed)
    working = 4 * 6 * max(rows * columns for rows, columns in shapes.values())
    if plan:
        weights, working = weights + restructure.new_bytes(model, plan), max(working, restructure.working(model, plan))
    if not (plan and plan.calibrated) and not needs_moments(choices):
        return memory.Prediction(weights, 0, working)
    limits = feed.window_limits(
        min(graph.context, 512), calibrate.CHUNK, kv_format=memory.kv_format(model.formats.values())
    )
    step = memory.predict(graph, weights, replace(limits, max_rows=1))
    hidden = 3 * 4 * CALIBRATION_TOKENS * graph.hidden
    return memory.Prediction(weights, step.kv_cache, max(step.buffers + hidden, working))
