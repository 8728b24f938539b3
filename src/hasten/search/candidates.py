"""What may become of each matrix, and where in the model it stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.compress import methods
from hasten.compress.recipe import KEEP, Choice
from hasten.formats import Format, Weight, get
from hasten.graph.graph import Graph
from hasten.graph.ops import Embed, Linear

FORMATS = (
    *("bf16", "int8-g64", "int8-g128", "int4-g32", "int4-g64", "int4-g128"),
    *("codebook4-g32", "codebook4-g64", "codebook4-g128", "int3-g64", "codebook3-g64"),
)
"""None of two bits, one, or half the weights: without training afterwards they lose more than their bytes are worth."""


@dataclass(frozen=True)
class Tensor:
    """A matrix of the model. `block` is the first that reads it: -1 before all blocks, their number after all."""

    name: str
    shape: tuple[int, int]
    format: str
    """As it is now."""
    block: int
    linears: int
    """How many linears multiply by it; an embedding table that is no head is only looked up."""
    embeds: int
    at_rows: bool
    """Read only for the rows whose logits are wanted: the head."""
    choices: tuple[Choice, ...]
    """The first one keeps it as it is."""

    @property
    def role(self) -> str:
        """The name without its block's number: what stands at the same place in every block."""
        return re.sub(r"\.\d+\.", ".*.", self.name)

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


def tensors(graph: Graph, weights: Mapping[str, Weight | npt.NDArray[np.float32]]) -> list[Tensor]:
    """Every matrix of the model with its choices, in order of first use."""
    found = []
    rows = graph.row_values()
    for spec in graph.matrices():
        weight = weights[spec.name]
        assert isinstance(weight, Weight), spec.name
        readers = [(place, n) for place, n in enumerate(graph.nodes) if spec.name in n.weights]
        linears = [n for _, n in readers if isinstance(n.op, Linear)]
        embeds = sum(isinstance(n.op, Embed) for _, n in readers)
        at_rows = all(n.inputs[0] in rows for n in linears)
        block = _block(graph, readers[0][0])
        made = all_choices(bool(linears))
        choices = (KEEP, *(c for c in made if smaller(get(c.format), weight.format, weight.shape)))
        tensor = Tensor(
            spec.name, weight.shape, weight.format.name, block, len(linears), embeds, at_rows and bool(linears), choices
        )
        found.append(tensor)
    return found


def all_choices(linear: bool) -> list[Choice]:
    """Every format by its best method; what no linear reads has no inputs that a method could know of."""
    return [Choice(name, methods.best_for(get(name), hessian=linear)) for name in FORMATS]


def smaller(format: Format, than: Format, shape: tuple[int, int]) -> bool:
    """Whether `format` stores the matrix in fewer bytes: anything else would lose quality for nothing."""
    return format.nbytes(*shape) < than.nbytes(*shape)


def nbytes(tensor: Tensor, choice: Choice) -> int:
    return get(tensor.format if choice.is_original else choice.format).nbytes(*tensor.shape)


def _block(graph: Graph, place: int) -> int:
    for index, block in enumerate(graph.blocks):
        if place < block.start:
            return index - 1
        if place < block.stop:
            return index
    return len(graph.blocks)
