"""Carries out a plan: blocks are dropped, then every block is narrowed and factored on what the blocks before now give.

One block's second moments are in memory at a time. Within a block heads come first, then channels, then low rank, each
with the inputs that the step before leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from hasten import formats
from hasten.backends.batch import Int32, Limits
from hasten.backends.cache import KvFormat
from hasten.checkpoint import Model
from hasten.compress import calibrate, folds, stream
from hasten.compress.calibrate import Report, Weights
from hasten.compress.recipe import KEEP, Choice
from hasten.compress.statistics import Statistics
from hasten.compress.stream import Task
from hasten.compress.structure_recipe import Factoring, Plan
from hasten.compress.structures import Change, Float32, Float64, Hessians, Read, blocks, channels, heads, svd
from hasten.errors import FormatError, InputError
from hasten.formats import Weight
from hasten.graph.graph import Graph
from hasten.graph.sites import attention_site, feed_forward_site
from hasten.graph.structure import LowRank, Structure, restructured

Apply = Callable[[Graph, Read, Hessians], Change]
Step = Callable[[Graph, int], "tuple[Sequence[str], Apply] | None"]
"""(a block alone, or what follows the last; its number) -> the weights whose second moments are wanted, and what is
then done; None: nothing here."""


@dataclass(frozen=True)
class Run:
    """How calibration text runs through the kernels."""

    windows: Sequence[Int32]
    kv_format: KvFormat
    threads: int = 0
    report: Report | None = None
    folds: tuple[str, ...] = ()

    @property
    def cache(self) -> str:
        """The cache's format while shapes change: where layers have formats of their own, bf16 stands for them all."""
        return self.kv_format if isinstance(self.kv_format, str) else "bf16"

    @property
    def limits(self) -> Limits:
        return calibrate.limits_for(self.windows, self.cache, self.threads)

    def task(self, model: Model, choices: Mapping[str, Choice]) -> Task:
        """The packing of what `model` has; a matrix that `choices` does not name stays as it is."""
        own = {m.name: choices.get(m.name, KEEP) for m in model.graph.matrices()}
        own_cache = self.kv_format if isinstance(self.kv_format, str) else model.kv_formats
        return Task(model, own, self.windows, own_cache, self.threads, self.folds)


def compress(
    model: Model, plan: Plan | None, choices: Mapping[str, Choice], run: Run, folder: Path
) -> tuple[Model, dict[str, Weight | Float32]]:
    """The model as `plan` changes it, and all its weights, packed as `choices` say. `folder`: see stream.compress.

    Raises InputError for a plan that `choices` make meaningless, and what apply, correct and stream.compress raise.
    """
    model = stream.turned(model, [name for name in run.folds if folds.get(name).WHOLE], choices)
    if plan:
        _check(plan, choices, run)
        model = apply(model, plan, run)
    weights = stream.compress(run.task(model, choices), folder, run.report)
    if plan and plan.corrected:
        model = correct(model, weights, plan, run)
        new = {name: choice for name, choice in choices.items() if name not in weights}
        weights = stream.compress(run.task(model, new), folder / "corrections", run.report)
    return model, weights


def _check(plan: Plan, choices: Mapping[str, Choice], run: Run) -> None:
    """Raise InputError for a correction beside a matrix that stays as it is, or is not packed as it was."""
    for name in plan.corrected:
        by_block = [fold for fold in run.folds if not folds.get(fold).WHOLE]
        if by_block:
            raise InputError(
                f"low_rank: '{name}' with a residual cannot go with fold: {by_block[0]}, which changes what is packed",
                "leave out one of the two",
            )
        if choices[name].is_original:
            raise InputError(
                f"low_rank: '{name}' stays as it is, so there is nothing for a residual's factors to make up for",
                "give it a format under 'tensors', or leave out residual",
            )


def new_bytes(model: Model, plan: Plan) -> int:
    """Most that new matrices take, in the model's dtype."""
    new = [*plan.factored, *(w for i in (*plan.heads, *plan.channels) for w in model.graph.block(i).weights)]
    each = formats.get(model.dtype)
    specs = [model.graph.weights[name] for name in dict.fromkeys(new)]
    return sum(each.nbytes(*spec.shape) for spec in specs if spec.is_matrix)


def working(model: Model, plan: Plan) -> int:
    """Most that a block's second moments and one matrix's decomposition or inverse take: about five float64 copies."""
    sizes = [model.graph.weights[name].shape for name in plan.factored]
    for index in plan.heads:
        sizes.append(model.graph.weights[attention_site(model.graph, index).output.weights[0]].shape)
    for index in plan.channels:
        sizes.append(model.graph.weights[feed_forward_site(model.graph, index).output.weights[0]].shape)
    return max((5 * 8 * max(shape[1] * shape[1], shape[0] * shape[1]) for shape in sizes), default=0)


def apply(model: Model, plan: Plan, run: Run) -> Model:
    """All of `plan` but corrections beside matrices that are to be quantised: `correct` makes these afterwards.

    Matrices that are new are held in the model's dtype. Raises InputError for calibration that cannot be used,
    FormatError naming a matrix whose new values its dtype cannot hold.
    """
    dropped = plan.dropped
    if plan.count:
        weights = model.weights(run.report)
        options = {"kv_format": run.cache, "threads": run.threads, "report": run.report}
        dropped = tuple(blocks.choose(model.graph, weights, run.windows, plan.count, plan.by, **options))  # type: ignore[arg-type]
    count = len(model.graph.blocks)
    if dropped:
        model = model.departing(*blocks.restructure(model.graph, model.tensor, {}, dropped))
    places = {old: new for new, old in enumerate(Structure(dropped).kept(count))}
    counts = {places[i]: kept for i, kept in plan.heads.items() if i in places}
    widths = {places[i]: kept for i, kept in plan.channels.items() if i in places}
    alone = {n: f for n, f in plan.factored.items() if not f.residual and n in model.graph.weights}
    if not (counts or widths or alone):
        return model
    return walk(model, [partial(_heads, counts), partial(_channels, widths), partial(_low_rank, alone)], run)


def correct(model: Model, packed: Weights, plan: Plan, run: Run) -> Model:
    """The model of the weights `packed`, with low-rank corrections of what packing did to the plan's matrices."""
    made = model.departing(Structure(), packed)
    beside = {n: f for n, f in plan.factored.items() if f.residual and n in model.graph.weights}
    return walk(made, [partial(_low_rank, beside, before=model.tensor)], run)


def walk(model: Model, steps: Sequence[Step], run: Run) -> Model:
    """`steps` on every block and on what follows the last, on the hidden states that the changed blocks before give."""
    graph, limits, total = model.graph, run.limits, len(model.graph.blocks) + 1
    front = {w: model.weight(w) for node in graph.nodes[: graph.blocks[0].start] for w in node.weights}
    hidden = calibrate.embed(graph, front, run.windows, limits)
    whole = Structure()
    new: dict[str, Weight | Float32] = {}
    for index in range(total):
        if run.report:
            run.report("restructuring", index, total)
        section = graph.block(index) if index < len(graph.blocks) else graph.tail(index)
        own = {name: model.weight(name) for name in section.weights}
        for step in steps:
            found = step(section, index)
            if found is None:
                continue
            seen = Statistics(tokens=sum(len(w) for w in run.windows))
            calibrate.look(section, own, run.windows, hidden, limits, seen, found[0])
            structure, values = found[1](section, partial(_read, own), _hessians(seen, found[0]))
            made = {name: _packed(name, v, model.dtype) for name, v in values.items()}
            new, own = new | made, own | made
            section = restructured(section, structure)
            narrowed = {index + i: narrow for i, narrow in structure.narrowed.items()}
            whole = whole.then(replace(structure, narrowed=narrowed), graph)
        if index < len(graph.blocks):
            hidden = calibrate.run(section, own, run.windows, hidden, limits)
    if run.report:
        run.report("restructuring", total, total)
    return model.departing(whole, new)


def _hessians(seen: Statistics, names: Sequence[str]) -> dict[str, Float64]:
    inputs = {name: seen.inputs(name) for name in names}
    return {n: i.hessian.astype(np.float64) for n, i in inputs.items() if i is not None and i.hessian is not None}


def _read(own: Weights, name: str) -> Float32:
    found = own[name]
    return found.dense() if isinstance(found, Weight) else found


def _packed(name: str, values: Float32, dtype: str) -> Weight | Float32:
    if values.ndim == 1:
        return values
    try:
        return formats.get(dtype).pack(values)
    except FormatError as error:
        raise FormatError(f"{name}: {error.message}", error.hint) from None


def _heads(kept: Mapping[int, heads.Kept], section: Graph, index: int) -> tuple[Sequence[str], Apply] | None:
    if index not in kept:
        return None
    name = attention_site(section, 0).output.weights[0]
    return [name], lambda graph, read, hessians: heads.restructure(graph, read, hessians, {0: kept[index]})


def _channels(kept: Mapping[int, int], section: Graph, index: int) -> tuple[Sequence[str], Apply] | None:
    if index not in kept:
        return None
    name = feed_forward_site(section, 0).output.weights[0]
    return [name], lambda graph, read, hessians: channels.restructure(graph, read, hessians, {0: kept[index]})


def _low_rank(
    rules: Mapping[str, Factoring], section: Graph, index: int, before: Read | None = None
) -> tuple[Sequence[str], Apply] | None:
    """`before` gives matrices as they were before they were packed, where what that lost is to be made up for."""
    own = {m.name: rules[m.name] for m in section.matrices() if m.name in rules}
    if not own:
        return None

    def act(graph: Graph, read: Read, hessians: Hessians) -> Change:
        beside = {name: read(name) for name in own} if before else {}
        values = before or read
        lost = {name: values(name) - beside[name] if before else values(name) for name in own}
        amount = _ranks(own, lost, hessians)
        return svd.restructure(graph, values, hessians, amount, beside)

    return list(own), act


def _ranks(rules: Mapping[str, Factoring], values: Mapping[str, Float32], hessians: Hessians) -> dict[str, LowRank]:
    """The ranks of a block's matrices; those that would not become smaller are left out."""
    found = {name: LowRank(rule.rank, rule.residual) for name, rule in rules.items() if rule.by == "rank"}
    for rule in dict.fromkeys(rules.values()):
        own = [name for name in rules if rules[name] is rule and name not in found]
        spectra = {name: svd.energies(values[name], hessians[name]) for name in own}
        shapes = {name: (values[name].shape[0], values[name].shape[1]) for name in own}
        if rule.by == "keep":
            ranks = svd.ranks_by_share(spectra, shapes, rule.share)
        else:
            ranks = {name: svd.rank_by_energy(energy, rule.share) for name, energy in spectra.items()}
        fits = {n: r for n, r in ranks.items() if r and (rule.residual or r <= svd.break_even(shapes[n]))}
        found |= {name: LowRank(rank, rule.residual) for name, rank in fits.items()}
    return found
