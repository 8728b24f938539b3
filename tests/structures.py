"""Random structures of test graphs, and which heads and channels of the narrowed blocks stay."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from hasten.graph.graph import Graph
from hasten.graph.structure import LowRank, Narrow, Structure, restructured


@st.composite
def structures(draw: st.DrawFn, blocks: int, heads: int, kv_heads: int, feed_forward: int, names: list[str]):
    """Valid ones, for a graph whose blocks all have these sizes; `names`: matrices that may be factored."""
    numbers = st.integers(0, blocks - 1)
    dropped = tuple(sorted(draw(st.sets(numbers, max_size=blocks - 1))))
    narrowed = {}
    for index in draw(st.sets(numbers)) - set(dropped):
        kv = draw(st.integers(1, kv_heads))
        group = draw(st.integers(1, heads // kv_heads))
        narrowed[index] = draw(
            st.sampled_from(
                [
                    Narrow(kv * group, kv),
                    Narrow(feed_forward=draw(st.integers(min(2, feed_forward), feed_forward))),
                    Narrow(kv_heads=1),
                ]
            )
        )
    left = [n for n in names if not any(f"blocks.{i}." in n for i in dropped)]
    chosen = draw(st.sets(st.sampled_from(left), max_size=6)) if left else set()
    low_rank = {n: LowRank(draw(st.integers(1, 2)), draw(st.booleans())) for n in sorted(chosen)}
    return Structure(dropped, narrowed, low_rank)


def random_kept(structure: Structure, graph: Graph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """For each narrowed weight of support.tiny_graph: the indices that stay, rows or (o, down) columns.

    No block may have more query heads a key head than it had: that is no part of the old model.
    """
    made = restructured(graph, Structure((), structure.narrowed))
    kept: dict[str, np.ndarray] = {}
    for index in structure.narrowed:
        at = f"blocks.{index}"
        nodes = {n.name: n.op for n in graph.nodes}
        old, new = nodes[f"{at}.attention"], {n.name: n.op for n in made.nodes}[f"{at}.attention"]
        groups = np.sort(rng.choice(old.kv_heads, new.kv_heads, replace=False))
        size, left = old.heads // old.kv_heads, new.heads // new.kv_heads
        heads = np.concatenate([g * size + np.sort(rng.choice(size, left, replace=False)) for g in groups])
        kept |= _heads(at, groups, heads, old.head_dim)
        width = graph.weights[f"{at}.down.weight"].shape[1]
        channels = np.sort(rng.choice(width, made.weights[f"{at}.down.weight"].shape[1], replace=False))
        kept |= dict.fromkeys([f"{at}.{part}.weight" for part in ("gate", "up", "down")], channels)
    return kept


def _heads(at: str, groups: np.ndarray, heads: np.ndarray, width: int) -> dict[str, np.ndarray]:
    features = lambda which: (which[:, None] * width + np.arange(width)).ravel()  # noqa: E731
    keys = {f"{at}.{part}.{kind}": features(groups) for part in "kv" for kind in ("weight", "bias")}
    return keys | {f"{at}.{part}": features(heads) for part in ("q.weight", "q.bias", "o.weight")}


def is_output(name: str) -> bool:
    """Whether channels or heads are the columns of this matrix."""
    return name.endswith((".o.weight", ".down.weight"))
