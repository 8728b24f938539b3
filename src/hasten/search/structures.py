"""Shapes that a search may start from: the model with a block less, narrower blocks or factored matrices, as a whole.

    shapes = structures.candidates(job, trials)         # after `explore`
    for shape in shapes:
        if shape.refused is None: ...                   # shape.model is a Model like job.model: search it as such
    document["refused shapes"] = [s.json() for s in shapes if s.refused]

Each is made on the first part of the calibration text and measured whole on the rest: KL(original || shape) in nats a
token, in the model's own formats. A shape is worth exploring where its loss leaves room for packing within the budget,
and where its matrices, all in one format that a search would take, cost less than the original's: time, or bytes where
memory is the objective; a narrower matrix costs its share. Measurements are kept in `trials`; weights are made again
when asked for, the same each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hasten import formats, models
from hasten.backends.batch import Int32
from hasten.checkpoint import Model
from hasten.compress import restructure, structure_recipe
from hasten.engine import memory
from hasten.errors import BudgetError, ConfigError, HastenError, InputError
from hasten.evaluate import perplexity
from hasten.formats import Weight
from hasten.graph.graph import Graph
from hasten.graph.structure import Narrow, Structure, parse, restructured
from hasten.search import cost, texts
from hasten.search.candidates import Tensor, tensors
from hasten.search.job import Job
from hasten.search.refine import NEVER, Choices, Space
from hasten.search.trials import Json, Trials
from hasten.search.widths import Widths

RECIPES: dict[str, dict[str, Any]] = {
    "a block less": {"drop_blocks": {"count": 1, "by": "similarity"}},
    "key heads of 7/8": {"heads": {"keep": "87.5%"}},
    "feed-forwards of low rank, 3/4": {"low_rank": {"match": "*.mlp.*", "keep": "75%"}},
}
ROOM = 0.6
"""Of the budget that a shape may use up: packing needs the rest."""
USED = 0.8
"""Of the budget, by losses that add up, of a candidate that will keep it, about."""
ELSEWHERE = 2.5
"""Times that a nat of a shape's divergence weighs what one of packing does: fitted to the calibration text, a shape
loses half as much again in perplexity elsewhere, where packed matrices lose less than they diverge. Of two models."""
SHARE = 0.25
"""Of the time left, that measuring shapes may take."""
FASTER = 0.98
"""Of the original's time, at most: less is not worth the loss."""
TYPICAL = ("int4-g64", "int8-g64")
MEASURED_TOKENS = 4096
LEVELS = [n / 16 for n in range(15, 3, -1)]
"""Shares of all feed-forward channels that narrower models may keep."""
MOST_NARROWED = 3
"""That are measured: each shows what the next is to be."""
OPTIMISM = 2.0
"""Times that a narrower model loses more than its blocks' losses add up to, before one was measured."""


@dataclass(frozen=True)
class Shape:
    """`loss`: nats a token; `cost` and `parameters`: as shares of the original's. `refused`: why it is not worth it.

    `recipe` is what a recipe's `structure` would say.
    """

    name: str
    recipe: Mapping[str, Any]
    structure: Structure
    loss: float
    cost: float
    parameters: float
    refused: str | None
    job: Job

    @cached_property
    def model(self) -> Model:
        """With its weights in the model's dtype, made anew. Raises what restructure.apply raises."""
        return _made(self.job, self.recipe, _split(self.job)[0])

    def json(self) -> Json:
        """For reports."""
        return {
            "name": self.name,
            "structure": self.structure.json(),
            "loss": self.loss if np.isfinite(self.loss) else None,
            "cost": self.cost,
            "parameters": self.parameters,
            "refused": self.refused,
        }


def promise(space: Space, graph: Graph, structure: Structure, loss: float, nats: float) -> float:
    """The cost of the best candidate of a shape, roughly, as a share of that of the best one of `graph`.

    What is left of each matrix costs its share, and loses in a format what all of it does: what a shape leaves out is
    what bears fewer bits best. `loss`: of the shape alone; `nats`: of the budget.
    """
    after = restructured(graph, structure)
    sizes = _sizes(after)
    left = {t.name: sum(n for name, n in sizes.items() if name.startswith(t.name)) for t in space.tensors}
    shares = [min(1.0, left[t.name] / t.parameters) for t in space.tensors]
    costs = [[share * cost for cost in row] for share, row in zip(shares, space.costs, strict=True)]
    small = replace(space, costs=costs)
    try:
        own = small.cost(small.allocate(min(USED * nats - ELSEWHERE * loss, NEVER)))
    except BudgetError:
        return math.inf
    return own / space.cost(likely(space, nats))


def likely(space: Space, nats: float) -> Choices:
    """About what a candidate that keeps the budget is made of."""
    try:
        return space.allocate(min(USED * nats, NEVER))
    except BudgetError:
        return space.original


def candidates(
    job: Job,
    trials: Trials,
    recipes: Mapping[str, Mapping[str, Any]] = RECIPES,
    widths: Widths | None = None,
    space: Space | None = None,
) -> list[Shape]:
    """Every shape that the model can take, measured, those worth exploring first, the cheapest of them before others.

    A recipe that the architecture has no place for is left out; a model of its own shape keeps it. With `widths` and
    `space`, narrower feed-forwards as well: what their channels lose, and the choices that there are for matrices.
    """
    if job.model.structure:  # its maker chose it
        return []
    found = []
    least = (1 - SHARE) * job.clock.left() if job.clock.limited else -math.inf
    if widths and space:
        found += _narrower(job, widths, space, trials, least)
    for done, (name, recipe) in enumerate(recipes.items(), MOST_NARROWED):
        job.report("shapes", done, len(recipes) + MOST_NARROWED)
        if job.clock.left() < least:
            break
        if shape := _shape(job, name, recipe, trials):
            found.append(shape)
    job.report("shapes", len(recipes) + MOST_NARROWED, len(recipes) + MOST_NARROWED)
    return sorted(found, key=lambda s: (s.refused is not None, s.cost))


def _shape(job: Job, name: str, recipe: Mapping[str, Any], trials: Trials) -> Shape | None:
    fit, held_out = _split(job)
    facts = [job.key, texts.digest(fit), texts.digest(held_out), dict(recipe)]
    figures = trials.get("shape", facts)
    if figures is None:
        figures = _measured(job, recipe, fit, held_out)
        trials.put("shape", facts, figures)
    if not figures:
        return None
    loss = float("inf") if figures["loss"] is None else figures["loss"]
    structure, share = parse(figures["structure"]), _cost(job, parse(figures["structure"]), trials)
    return Shape(name, recipe, structure, loss, share, figures["parameters"], _refusal(job, loss, share), job)


def _narrower(job: Job, widths: Widths, space: Space, trials: Trials, least: float) -> list[Shape]:
    """Feed-forwards of the share that promises the most; what one loses says which to measure next.

    `least`: seconds that must be left.
    """
    found: dict[float, Shape | None] = {}
    times = OPTIMISM
    for _ in range(MOST_NARROWED):

        def promised(level: float) -> float:
            keep = widths.keep(level)
            structure = Structure(narrowed={b: Narrow(feed_forward=kept) for b, kept in widths.narrowed(keep).items()})
            return promise(space, job.graph, structure, times * widths.loss(keep), job.budget.nats)  # noqa: B023

        level = min(LEVELS, key=promised)
        if level in found or not promised(level) < 1 or job.clock.left() < least:
            break
        keep = widths.keep(level)
        found[level] = shape = _shape(job, f"feed-forwards of {level:.0%}, by block", widths.recipe(keep), trials)
        expected = widths.loss(keep)
        if shape and expected > 0:
            times = min(max(shape.loss / expected, 0.2), 50.0)
    return [shape for shape in found.values() if shape]


def _split(job: Job) -> tuple[list[Int32], list[Int32]]:
    """Windows to fit on, and others to measure on: a quarter of the calibration text, if it is in several."""
    windows = job.texts.calibration
    last = max(1, len(windows) // 4)
    if len(windows) == 1:
        half = len(windows[0]) // 2
        return [windows[0][:half]], [windows[0][half:]]
    return list(windows[:-last]), texts.take(windows[-last:], MEASURED_TOKENS)


def _made(job: Job, recipe: Mapping[str, Any], windows: Sequence[Int32]) -> Model:
    plan = structure_recipe.parse(dict(recipe)).plan(job.graph, job.model.structure)
    return restructure.apply(job.model, plan, restructure.Run(windows, job.kv_format, job.threads))


def _measured(job: Job, recipe: Mapping[str, Any], fit: Sequence[Int32], held_out: Sequence[Int32]) -> Json:
    """Loss, structure and size of a shape; {} where the model cannot take it, or is left as it was."""
    try:
        made = _made(job, recipe, fit)
    except (InputError, ConfigError):
        return {}
    if made.graph.parameters() >= job.graph.parameters():
        return {}
    loss = None
    try:
        evaluation = perplexity.measure(
            made.graph,
            made.weights(),
            held_out,
            reference=(job.graph, job.original),
            threads=job.threads,
            kv_format=memory.kv_format(made.formats.values(), own=made.kv_formats),
            reference_kv_format=job.kv_format,
        )
        assert evaluation.divergences is not None
        mean = float(np.concatenate(evaluation.divergences).mean())
        loss = mean if np.isfinite(mean) else None
    except HastenError as error:
        job.say(f"a shape cannot be measured: {error.message}")
    share = made.graph.parameters() / job.graph.parameters()
    return {"loss": loss, "structure": made.structure.json(), "parameters": share}


def _cost(job: Job, structure: Structure, trials: Trials) -> float:
    """The shape's matrices as a share of the original's: time of the objective's steps, or bytes."""
    after = restructured(models.build(job.model.config, job.graph.context), structure)
    own = _costs(job, job.graph, trials)
    if structure.low_rank:  # matrices of new shapes, and more of them
        return sum(_costs(job, after, trials).values()) / sum(own.values())
    # Narrower ones by their share: times taken apart differ by more than what is to be seen.
    before, left = _sizes(job.graph), _sizes(after)
    return sum(cost * left.get(name, 0) / before[name] for name, cost in own.items()) / sum(own.values())


def _sizes(graph: Graph) -> dict[str, int]:
    return {m.name: m.shape[0] * m.shape[1] for m in graph.matrices()}


def _costs(job: Job, graph: Graph, trials: Trials) -> dict[str, float]:
    """Of all matrices, in a typical format."""
    format = formats.get(job.model.dtype)
    held = {m.name: Weight(format, (m.shape[0], m.shape[1]), {}) for m in graph.matrices()}  # only shapes are asked for
    found = [_typical(t) for t in tensors(graph, held)]
    times = cost.measure(found, job.objective, job.threads, trials, job.kernels, job.report)
    return {t.name: cost.costs(t, job.objective, times)[0] for t in found}


def _typical(tensor: Tensor) -> Tensor:
    chosen = next((c for name in TYPICAL for c in tensor.choices if c.format == name), tensor.choices[0])
    return replace(tensor, choices=(chosen,))


def _refusal(job: Job, loss: float, share: float) -> str | None:
    room = ROOM * job.budget.nats
    what = "bytes" if job.objective.name == "memory" else "time"
    if share > FASTER:
        return f"its matrices take {share:.1%} of the original's {what}"
    if not loss <= room:
        return f"it loses {loss:.4f} nats a token alone, of {job.budget.nats:.4f} that the budget comes to"
    return None
