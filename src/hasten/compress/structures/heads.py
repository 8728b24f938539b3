"""Heads removed: first whole groups (a key and value head with its query heads), then query heads of every group.

A head's score is what its removal costs at o_proj's output, with the mean of x xᵀ over o_proj's inputs: the energy
tr(O_h H_hh O_hᵀ) that it puts out, or what is left of it once the other heads have made up for it by least squares
(Removal). They go one after another, and o_proj is repaired. Every group keeps as many query heads as the others, as
grouped attention (Ainslie et al. 2023, arXiv:2305.13245) asks for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hasten.compress.structures import Change, Float32, Float64, Hessians, Read, checked
from hasten.compress.structures._removal import DAMPING, Index, Removal, Score
from hasten.graph.graph import Graph
from hasten.graph.sites import attention_site
from hasten.graph.structure import Narrow, Structure

Kept = tuple[int, int]
"""Key heads that stay, and query heads that stay for each of them."""


def restructure(graph: Graph, read: Read, hessians: Hessians, amount: Mapping[int, Kept]) -> Change:
    """`amount`: block -> how many heads stay.

    Raises ConfigError where a block's heads cannot be told apart, InputError for second moments that are none.
    """
    new: dict[str, Float32] = {}
    narrowed: dict[int, Narrow] = {}
    for block, kept in amount.items():
        site = attention_site(graph, block)
        op, name = site.op, site.output.weights[0]
        hessian = checked(name, read(name), hessians[name])
        groups, heads, new[name] = choose(read(name), hessian, (op.kv_heads, op.heads // op.kv_heads), kept)
        for way, which in zip(site.ways, (heads, groups, groups), strict=True):
            rows = features(which, op.head_dim)
            new |= {weight: np.ascontiguousarray(read(weight)[rows]) for weight in way[0].weights}
        narrowed[block] = Narrow(len(heads), len(groups))
    return Structure(narrowed=narrowed), new


def features(heads: Index, head_dim: int) -> Index:
    """The features [len(heads) * head_dim] of these heads."""
    return np.asarray((heads[:, None] * head_dim + np.arange(head_dim)).ravel())


def choose(
    output: Float32,
    hessian: Float64,
    had: Kept,
    keep: Kept,
    score: Score = "repair",
    damping: float = DAMPING,
) -> tuple[Index, Index, Float32]:
    """(key heads that stay, query heads that stay, o_proj [out, heads * head_dim] repaired), heads ascending."""
    removal = Removal(output, hessian, damping)
    groups, size = had
    head_dim = output.shape[1] // (groups * size)
    heads: Index = np.arange(groups * size).reshape(groups, size)  # [groups, query heads]
    while len(heads) > keep[0]:
        costs = removal.costs(np.stack([features(group, head_dim) for group in heads]), score)
        least = int(np.argmin(costs))
        removal.remove(features(heads[least], head_dim))
        heads = heads[np.arange(len(heads)) != least]
    while heads.shape[1] > keep[1]:
        costs = removal.costs(np.stack([features(head, head_dim) for head in heads.reshape(-1, 1)]), score)
        lowest = np.argmin(costs.reshape(heads.shape), axis=1, keepdims=True)  # [groups, 1]
        gone = np.take_along_axis(heads, lowest, axis=1)
        removal.remove(features(gone.ravel(), head_dim))
        heads = heads[heads != gone].reshape(len(heads), -1)
    kept = heads.ravel()
    repaired = np.ascontiguousarray(removal.weights[:, features(kept, head_dim)], dtype=np.float32)
    return heads[:, 0] // size, kept, repaired
