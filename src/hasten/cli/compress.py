"""`hasten compress`: a model packed as a recipe says, without a search."""

from __future__ import annotations

import json as json_module
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.cli.options import argument, option, required
from hasten.cli.progress import reporter
from hasten.errors import HastenError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hasten.backends.batch import Int32
    from hasten.backends.cache import KvFormat
    from hasten.checkpoint import Model
    from hasten.compress.recipe import Choice, Recipe
    from hasten.compress.stream import Task
    from hasten.compress.structure_recipe import Plan
    from hasten.engine.memory import Prediction

HELP = "pack a model's matrices as a recipe says"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="a Hugging Face directory, a hub id, a hasten artifact, or demo")
    output: Path = required("-o", help="directory to write; must not exist", metavar="OUT")
    recipe: Path = required(help="YAML: patterns of tensor names to format and method", metavar="FILE")
    calibration: Path | None = option(None, help="text to gather statistics on", metavar="FILE")
    calibration_tokens: int = option(32768, help="tokens of that text to use, at most", metavar="N")
    threads: int = option(0, help="threads to use; 0: all that this process may")
    json: bool = option(False, help="print the result as JSON")


def run(options: Options) -> int:
    from hasten import checkpoint
    from hasten.backends import cache
    from hasten.compress import folds, recipe, restructure
    from hasten.engine import memory
    from hasten.engine.llm import DEFAULT_CONTEXT
    from hasten.search import document

    wanted = recipe.read(options.recipe)
    checkpoint.check_output(options.output)
    model = checkpoint.open(options.model)
    model = model.at_context(min(model.graph.context, DEFAULT_CONTEXT))  # as it is served: rope may depend on it
    plan = wanted.structure.plan(model.graph, model.structure) if wanted.structure else None
    choices = wanted.assign(plan.names if plan else [m.name for m in model.graph.matrices()])
    needed = (plan is not None and plan.calibrated) or any(folds.get(n).NEEDS != "nothing" for n in wanted.folds)
    text = windows(options, model, choices, needed)
    how = restructure.Run(
        text, memory.kv_format(model.formats.values(), own=model.kv_formats), options.threads, folds=wanted.folds
    )
    turned = any(folds.get(name).WHOLE for name in wanted.folds)
    memory.require(predict(how.task(model, choices), plan, turned), memory.memory()[1])
    if plan is None and (named := _cache(wanted, model)):  # refused before anything takes long
        cache.formats_of(model.graph, named)
    structure = wanted.structure.document if wanted.structure else None
    facts = document.recipe(choices, structure, wanted.cache)
    facts |= {"fold": list(wanted.folds)} if wanted.folds else {}
    before = model.bytes_on_disk
    work = options.output.absolute().with_name(options.output.absolute().name + ".work")
    if work.is_dir():
        print(f"note: {work} holds an earlier run's work: continued if it was asked for the same", file=sys.stderr)
    try:
        with reporter() as report:
            model, weights = restructure.compress(model, plan, choices, replace(how, report=report), work)
            kv_formats = cache.formats_of(model.graph, kept) if (kept := _cache(wanted, model)) else ()
            written = checkpoint.write_artifact(options.output, model, weights, facts, {}, kv_formats)
    except HastenError:
        if not any(work.rglob("section-*")):
            shutil.rmtree(work, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        print("note: the same command, given again, continues from here", file=sys.stderr)
        raise
    formats = {m.name: weights[m.name].format.name for m in model.graph.matrices()}  # type: ignore[union-attr]
    del weights
    shutil.rmtree(work, ignore_errors=True)
    after = sum(f.stat().st_size for f in written.iterdir())
    if options.json:
        shown = {"output": str(options.output), "bytes_before": before, "bytes_after": after, "formats": formats}
        print(json_module.dumps(shown, indent=1))
    else:
        print(f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB\nartifact: {options.output}")
    return 0


def _cache(wanted: Recipe, model: Model) -> KvFormat:
    """The recipe's, or else what the model has already; empty for neither."""
    return model.kv_formats if wanted.cache == "auto" else wanted.cache


def windows(options: Options, model: Model, choices: Mapping[str, Choice], always: bool) -> list[Int32]:
    """What to calibrate on: nothing where no method asks for it, unless it is needed `always`."""
    from hasten.compress.run import needs
    from hasten.search import texts

    if not (always or set(needs(choices).values()) - {"nothing"}):
        return []
    found, source = texts.calibration_windows(
        model.tokenizer, model.graph.context, options.calibration, options.calibration_tokens
    )
    if options.calibration is None and options.model != "demo":
        print(f"note: calibrated on {source}; --calibration FILE takes another text", file=sys.stderr)
    return found


def predict(task: Task, plan: Plan | None = None, turned: bool = False) -> Prediction:
    """What `compress` takes: a block as it is and packed, the hidden states before and after it, and its statistics.

    With a plan all matrices that are new are held, too, and what goes into them; `turned` whole, all are in float32.
    """
    from hasten import formats
    from hasten.compress import calibrate, folds, gradients, restructure, stream
    from hasten.compress.moments import CHUNKS, TOKENS
    from hasten.compress.run import needs
    from hasten.engine import memory

    graph = task.model.graph
    shapes = {spec.name: spec.shape for spec in graph.matrices()}
    stored = task.model.formats
    asked = needs(task.choices)
    blocks = [graph.block(i) for i in range(len(graph.blocks))] + [graph.tail(len(graph.blocks))]
    weights, working, rough = 0, stream.LIBRARIES, formats.get("int4-g32")  # that blocks are looked at in
    by_block = [fold.NEEDS for name in task.folds if not (fold := folds.get(name)).WHOLE]
    for section in blocks:
        own = memory.weight_bytes(section, stored)
        own += sum(
            max(formats.get(c.format).nbytes(*s.shape), rough.nbytes(*s.shape))
            for s in section.matrices()
            if not (c := task.choices[s.name]).is_original
        )
        own += sum(4 * s.shape[0] * s.shape[1] for s in section.matrices() if by_block)
        widths = [shapes[names[0]][1] for names in calibrate.linear_inputs(section).values()]
        second = [
            w
            for w, names in zip(widths, calibrate.linear_inputs(section).values(), strict=True)
            if by_block.count("hessian") or any(asked.get(n) == "hessian" for n in names)
        ]
        largest = max((shapes[s.name][0] * shapes[s.name][1] for s in section.matrices()), default=0)
        rows = CHUNKS * TOKENS + calibrate.CHUNK
        gathered = sum(4 * w * w + 4 * rows * w for w in second)
        gathered += 6 * rows * max(second, default=0) + 8 * max(second, default=0) ** 2  # the last factor
        made = 4 * stream.COPIES * largest + (4 * sum(w * w for w in second) + 16 * max(second, default=0) ** 2)
        weights, working = max(weights, own), max(working, stream.LIBRARIES + max(gathered, made))
    if "gradients" in asked.values():
        weights += 4 * gradients.COPIES * graph.parameters()
    if turned:
        weights += 4 * graph.parameters()
    if plan:
        weights += restructure.new_bytes(task.model, plan)
        working = max(working, restructure.working(task.model, plan))
    if not task.windows:
        return memory.Prediction(weights, 0, working)
    tokens = sum(len(w) for w in task.windows)
    step = memory.predict(graph.block(0), 0, task.limits())
    return memory.Prediction(weights, step.kv_cache, step.buffers + 3 * 4 * tokens * graph.hidden + working)
