"""Methods that change numbers but not what a model computes, so that it loses less when it is quantised. One a file.

What one op divides by, the next multiplies by: scales and rotations are folded into weights, and nothing is left to do
when the model runs. A fold is a module with
    WHOLE: bool                                   whether it looks at a whole model, or at one block after another
    NEEDS: "nothing", "moments" or "hessian"      what it must be told of the inputs of linears
    def fold(graph, read, inputs, choices) -> dict[str, Float32]
where `read(name)` gives a weight of the graph as float32, `inputs(name)` what flows into a matrix, and `choices` says
what will become of it. It returns the weights that differ.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from hasten.compress.methods import Inputs, Needs
from hasten.compress.recipe import Choice
from hasten.errors import ConfigError, InputError
from hasten.graph.graph import Graph, Node
from hasten.graph.ops import Gate, Linear, Norm
from hasten.graph.sites import attention_site, feed_forward_site

Float32 = npt.NDArray[np.float32]
Read = Callable[[str], Float32]
KnownInputs = Callable[[str], Inputs | None]
Choices = Mapping[str, Choice]
New = dict[str, Float32]


class Fold(Protocol):
    WHOLE: bool
    NEEDS: Needs

    def fold(self, graph: Graph, read: Read, inputs: KnownInputs, choices: Choices) -> New: ...


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Fold:
    """The fold called `name`. Raises InputError listing those that exist."""
    if name not in names():
        raise InputError(f"unknown fold '{name}'", f"known folds: {', '.join(names())}")
    return cast(Fold, importlib.import_module(f"{__name__}.{name}"))


@dataclass(frozen=True)
class Seam:
    """Where scales can be folded: `readers` are matrices whose columns are multiplied by s, one for each feature.

    `before` says what is divided by it: a norm's weight, or the rows of the one linear that makes the features, from
    which each of its rows is read `repeats` times, heads of `size` rows going together.
    """

    before: Node
    readers: tuple[str, ...]
    repeats: int = 1
    size: int = 1

    def spread(self, scales: Float32) -> Float32:
        """[rows of before] -> [columns of readers]."""
        return np.repeat(scales.reshape(-1, self.size), self.repeats, axis=0).reshape(-1)

    def gathered(self, values: npt.NDArray[np.floating]) -> Float32:
        """[columns of readers] -> [rows of before]: the mean over what comes from the same row."""
        return np.asarray(values.reshape(-1, self.repeats, self.size).mean(axis=1).reshape(-1), np.float32)


def seams(graph: Graph) -> list[Seam]:
    """Of a block alone: norms that only linears read, values before the output projection, up before down."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    found = []
    for node in graph.nodes:
        own = readers.get(node.outputs[0], [])
        linear = bool(own) and all(isinstance(n.op, Linear) for n in own) and graph.output not in node.outputs
        if isinstance(node.op, Norm) and node.op.heads == 1 and linear:
            found.append(Seam(node, tuple(n.weights[0] for n in own)))
    try:
        site = attention_site(graph, 0)
        if len(site.ways[2]) == 1:  # nothing stands between the projection and the attention
            op = site.op
            seam = Seam(site.ways[2][0], (site.output.weights[0],), op.heads // op.kv_heads, op.head_dim)
            found.append(seam)
    except ConfigError:
        pass
    try:
        place = feed_forward_site(graph, 0)
        if isinstance(place.middle.op, Gate):
            found.append(Seam(place.inputs[1], (place.output.weights[0],)))
    except ConfigError:
        pass
    return found


def divided(seam: Seam, read: Read, scales: Float32) -> New:
    """The weights of `seam.before` when each feature is divided by its scale."""
    node = seam.before
    if isinstance(node.op, Norm):
        offset = np.float32(node.op.offset)
        made = {node.weights[0]: (read(node.weights[0]) + offset) / scales - offset}
        return made | {name: read(name) / scales for name in node.weights[1:]}  # a layer norm's bias
    made = {node.weights[0]: read(node.weights[0]) / scales[:, None]}
    return made | {name: read(name) / scales for name in node.weights[1:]}


def scaled(seam: Seam, read: Read, scales: Float32) -> New:
    """All weights that change when a seam's features are divided by `scales` [rows of before] and multiplied back."""
    columns = seam.spread(scales)
    return divided(seam, read, scales) | {name: read(name) * columns for name in seam.readers}


def chain(read: Read, new: Mapping[str, Float32]) -> Read:
    """`read`, with what is new in place of what was."""
    return lambda name: new[name] if name in new else read(name)


def quantised(seam: Seam, choices: Choices, kinds: Sequence[str]) -> bool:
    """Whether every reader of a seam becomes one of the formats whose names begin with one of `kinds`."""
    own = [choices.get(name) for name in seam.readers]
    return all(c is not None and c.format.startswith(tuple(kinds)) for c in own)
