"""How wide each block's feed-forward is to be: as many channels go from each as lose the least together.

What a block's output loses with its channels is known from the second moments of their activations, what that costs the
model from the sensitivity of the matrix that reads them: a change of its output is one, whether packing or narrowing
makes it. Channels differ far more between blocks than within one, so the same share of all would be a poor choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from hasten.compress.recipe import Choice
from hasten.compress.run import Packer
from hasten.compress.statistics import Statistics
from hasten.compress.structures import channels, checked
from hasten.errors import ConfigError
from hasten.graph.graph import Graph
from hasten.graph.sites import feed_forward_site
from hasten.search.refine import NEVER, Space
from hasten.search.trials import Json, Trials

UNIT = 32
"""Channels that go at once, or so many times more that STEPS steps are enough."""
STEPS = 32
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Widths:
    """Of `blocks`: `full` widths; with k times `units[b]` channels fewer the b-th loses `losses[b][k]` nats a token."""

    blocks: tuple[int, ...]
    full: tuple[int, ...]
    units: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]

    def keep(self, share: float) -> tuple[int, ...]:
        """The widths that leave about `share` of all channels, for the least loss: one unit after another goes."""
        cut, gone, most = [0] * len(self.full), 0, round((1 - share) * sum(self.full))
        while True:
            steps = [
                ((row[k + 1] - row[k]) / unit, block)
                for block, (k, row, unit) in enumerate(zip(cut, self.losses, self.units, strict=True))
                if k + 1 < len(row) and gone + unit <= most
            ]
            if not steps:
                return tuple(full - unit * k for full, unit, k in zip(self.full, self.units, cut, strict=True))
            block = min(steps)[1]
            cut[block] += 1
            gone += self.units[block]

    def loss(self, keep: Sequence[int]) -> float:
        """What these widths lose together, if losses added up."""
        rows = zip(self.full, keep, self.units, self.losses, strict=True)
        return sum(row[(full - kept) // unit] for full, kept, unit, row in rows)

    def narrowed(self, keep: Sequence[int]) -> dict[int, int]:
        """Block -> its width, of those that are narrower than they were."""
        return {b: k for b, k, full in zip(self.blocks, keep, self.full, strict=True) if k < full}

    def recipe(self, keep: Sequence[int]) -> dict[str, Any]:
        """As a recipe's `structure` says it."""
        return {"feed_forward": [{"keep": k, "blocks": [b]} for b, k in self.narrowed(keep).items()]}


def find(
    graph: Graph, statistics: Statistics, space: Space, packer: Packer, trials: Trials, key: Json, report: Report
) -> Widths | None:
    """None where no block has channels that could go and an output whose worth is known.

    Raises InputError where a block's second moments are none.
    """
    tensors = dict(zip((t.name for t in space.tensors), zip(space.tensors, space.losses, strict=True), strict=True))
    blocks: list[int] = []
    full: list[int] = []
    units: list[int] = []
    losses: list[tuple[float, ...]] = []
    for block in range(len(graph.blocks)):
        report("widths", block, len(graph.blocks))
        try:
            name = feed_forward_site(graph, block).output.weights[0]
        except ConfigError:
            continue
        tensor, row = tensors[name]
        moments, width = statistics.inputs(name), tensor.shape[1]
        known = [(loss, c) for loss, c in zip(row, tensor.choices, strict=True) if not c.is_original and loss < NEVER]
        blocks.append(block)
        if moments is None or moments.hessian is None or not known:  # it stays as it is
            full, units, losses = [*full, width], [*units, width], [*losses, (0.0,)]
            continue
        unit = UNIT * max(1, -(-width // (UNIT * STEPS)))
        loss, choice = max(known, key=lambda one: one[0])
        make = partial(_curve, packer, name, np.asarray(moments.hessian, np.float64), unit, choice, loss)
        full.append(width)
        units.append(unit)
        losses.append(tuple(trials.measure("widths", [key, name, unit, asdict(choice), loss], make)))
    report("widths", len(graph.blocks), len(graph.blocks))
    if all(len(row) == 1 for row in losses):
        return None
    return Widths(tuple(blocks), tuple(full), tuple(units), tuple(losses))


def _curve(packer: Packer, name: str, hessian: np.ndarray, unit: int, choice: Choice, loss: float) -> list[float]:
    """Nats a token with so many units of channels fewer; `loss`: of `choice`, by which errors are turned into nats."""
    values = packer.values(name)
    error = packer.error(name, choice)
    each = loss / error if error > 0 and math.isfinite(error) else 0.0
    return [each * one for one in channels.curve(values, checked(name, values, hessian), unit)]
