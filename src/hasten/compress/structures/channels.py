"""Feed-forward channels removed: rows of gate and up, columns of down; down is repaired by least squares.

A channel's score is what its removal costs at down's output once the others have made up for it (Removal), taken in
rounds since each removal changes the others' scores; or without repair, H_jj |W_:j|², which is activation norm times
weight norm, squared (Wanda's score summed over a column: Sun et al. 2023, arXiv:2306.11695; as FLAP uses it:
An et al. 2023, arXiv:2312.11983); or, where gradients are given, Taylor's sum_i g²_ij W²_ij (Molchanov et al. 2019,
arXiv:1906.10771).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hasten.compress.structures import Change, Float32, Float64, Hessians, Read, checked
from hasten.compress.structures._removal import DAMPING, Index, Removal, Score
from hasten.graph.graph import Graph
from hasten.graph.sites import feed_forward_site
from hasten.graph.structure import Narrow, Structure

ROUNDS = 8


def restructure(
    graph: Graph,
    read: Read,
    hessians: Hessians,
    amount: Mapping[int, int],
    gradients: Mapping[str, Float64] | None = None,
) -> Change:
    """`amount`: block -> channels that stay. `gradients`: down's name -> mean square of the loss's gradient [out, in].

    Raises ConfigError where a block has no channels of that kind, InputError for second moments that are none.
    """
    new: dict[str, Float32] = {}
    for block, keep in amount.items():
        site = feed_forward_site(graph, block)
        name = site.output.weights[0]
        kept, new[name] = choose(
            read(name), checked(name, read(name), hessians[name]), keep, gradients=(gradients or {}).get(name)
        )
        for node in site.inputs:
            new |= {weight: np.ascontiguousarray(read(weight)[kept]) for weight in node.weights}
    return Structure(narrowed={block: Narrow(feed_forward=keep) for block, keep in amount.items()}), new


def choose(
    down: Float32,
    hessian: Float64,
    keep: int,
    score: Score = "repair",
    gradients: Float64 | None = None,
    damping: float = DAMPING,
) -> tuple[Index, Float32]:
    """(the channels that stay, ascending [keep]; down repaired for them [out, keep])."""
    removal = Removal(down, hessian, damping)
    left = np.arange(down.shape[1])
    if gradients is not None:
        taylor = np.einsum("oc,oc->c", gradients, np.square(down, dtype=np.float64))
        removal.remove(np.argsort(taylor, kind="stable")[: len(left) - keep])
        left = np.sort(np.argsort(taylor, kind="stable")[len(left) - keep :])
    rounds = ROUNDS if score == "repair" else 1
    for stop in np.linspace(len(left), keep, rounds + 1).astype(int)[1:]:
        order = np.argsort(removal.costs(left[:, None], score), kind="stable")
        removal.remove(left[order[: len(left) - stop]])
        left = np.sort(left[order[len(left) - stop :]])
    return left, np.ascontiguousarray(removal.weights[:, left], dtype=np.float32)


def curve(down: Float32, hessian: Float64, unit: int, damping: float = DAMPING) -> list[float]:
    """What narrowing adds to the mean squared error of down's output, for 0, unit, 2 * unit ... channels fewer.

    The others make up for those that go, `unit` at a time; one unit is left.
    """
    removal, left = Removal(down, hessian, damping), np.arange(down.shape[1])
    found = [0.0]
    while len(left) > unit:
        order = np.argsort(removal.costs(left[:, None], "repair"), kind="stable")
        found.append(found[-1] + max(0.0, removal.remove(left[order[:unit]])))
        left = np.sort(left[order[unit:]])
    return found
