"""Matrices of low rank: W [out, in] as left [out, rank] times right [rank, in], alone or beside a quantised W.

The product that leaves the least error at the layer's output, E|(W - left right) x|², is the truncated singular value
decomposition of W L with L Lᵀ = E[x xᵀ] (whitened: SVD-LLM, Wang et al. 2024, arXiv:2403.07378). Its left singular
vectors U alone say it: the best product is U Uᵀ W, so nothing is divided by a singular L. Without second moments L is
one, and it is W's own decomposition. What quantisation took away is fitted the same way: W ≈ Q + left right, with the
decomposition of (W - Q) L (LQER, Zhang et al. 2024, arXiv:2402.02446, with the whole of L in place of its diagonal).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hasten.compress.structures import Change, Float32, Float64, Hessians, Read, checked
from hasten.graph.graph import Graph
from hasten.graph.structure import LEFT, RIGHT, LowRank, Structure

PANEL = 16
"""Rows that kernels take together: ranks that are searched for are multiples of it, where they are larger."""


def restructure(
    graph: Graph,
    read: Read,
    hessians: Hessians,
    amount: Mapping[str, LowRank],
    beside: Mapping[str, Float32] | None = None,
) -> Change:
    """`amount`: matrix -> its rank. `beside`: what stays of the matrices that keep a residual, as float32.

    A matrix without second moments in `hessians` is factored as it is. Raises InputError for some that are none.
    """
    new: dict[str, Float32] = {}
    for name, low_rank in amount.items():
        values = read(name)
        if low_rank.residual:
            values = values - (beside or {})[name]
        hessian = checked(name, values, hessians[name]) if name in hessians else None
        new[name + LEFT], new[name + RIGHT] = factors(values, hessian, low_rank.rank)
    return Structure(low_rank=dict(amount)), new


def factors(values: Float32, hessian: Float64 | None, rank: int) -> tuple[Float32, Float32]:
    """(left [out, rank] with orthonormal columns, right [rank, in]) of least error at the output."""
    basis = _spectrum(values, hessian)[1][:, :rank]  # [out, rank]
    return basis.astype(np.float32), (basis.T @ values).astype(np.float32)


def energies(values: Float32, hessian: Float64 | None) -> Float64:
    """[min(out, in)] squared singular values of W L, descending: what each rank more takes off the squared error."""
    return _spectrum(values, hessian)[0]


def _spectrum(values: Float32, hessian: Float64 | None) -> tuple[Float64, Float64]:
    """Squared singular values [n] of W L, descending, and its left singular vectors [out, n]; n = min(out, in)."""
    w = values.astype(np.float64)
    if w.shape[0] <= w.shape[1]:
        squares, vectors = np.linalg.eigh(w @ w.T if hessian is None else w @ hessian @ w.T)
        return np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    scaled = w if hessian is None else w @ _root(hessian)  # W L [out, in]
    squares, vectors = np.linalg.eigh(scaled.T @ scaled)
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    basis, _ = np.linalg.qr(scaled @ vectors)  # orthonormal where singular values are zero, too
    return squares, basis


def _root(hessian: Float64) -> Float64:
    """L with L Lᵀ = H, whether H is singular or not."""
    squares, vectors = np.linalg.eigh(hessian)
    made: Float64 = vectors * np.sqrt(np.maximum(squares, 0.0))
    return made


def break_even(shape: tuple[int, int]) -> int:
    """The largest rank whose factors are fewer numbers than the matrix; 0: none."""
    out, width = shape
    return (out * width - 1) // (out + width)


def rank_by_energy(energy: Float64, share: float) -> int:
    """The smallest rank that keeps `share` of the energy, in whole panels."""
    total = energy.sum()
    if not total > 0:
        return 1
    kept = np.cumsum(energy) / total
    return _panels(int(np.searchsorted(kept, share - 1e-12) + 1), len(energy))


def ranks_by_share(
    spectra: Mapping[str, Float64], shapes: Mapping[str, tuple[int, int]], share: float
) -> dict[str, int]:
    """Ranks whose factors hold about `share` of the matrices' numbers, given where they keep most of the output.

    Every tensor's loss is the share of its energy that is lost; it falls ever more slowly, so taking the best gain for
    each number spent, one rank after another, is optimal. No rank passes its break-even.
    """
    offers = []
    for name, energy in spectra.items():
        each = sum(shapes[name])
        gains = energy[: break_even(shapes[name])] / (energy.sum() or 1.0) / each
        offers += [(-gain, name, each) for gain in gains]
    room = share * sum(out * width for out, width in shapes.values())
    ranks = dict.fromkeys(spectra, 0)
    for _, name, each in sorted(offers):
        if each <= room:
            ranks[name] += 1
            room -= each
    return {
        name: min(_panels(max(rank, 1), len(spectra[name])), break_even(shapes[name])) for name, rank in ranks.items()
    }


def _panels(rank: int, most: int) -> int:
    """The nearest multiple of PANEL, where `rank` is no smaller than one."""
    return rank if rank < PANEL else min(max(round(rank / PANEL), 1) * PANEL, most)
