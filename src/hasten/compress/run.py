"""Applies choices to a model's matrices: `hasten compress`, and the packing that the search does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hasten import formats
from hasten.compress import methods
from hasten.compress.methods import Inputs
from hasten.compress.methods._sweep import loss
from hasten.compress.recipe import Choice
from hasten.errors import FormatError
from hasten.formats import Weight

Float32 = npt.NDArray[np.float32]
KnownInputs = Callable[[str], Inputs | None]
Report = Callable[[str, int, int], None]


class Packer:
    """Makes, and keeps as far as `memory` bytes go, the packed form of each (matrix, choice).

    `original` holds the model's own weights, `values(name)` reads one as float32 [out, in], `inputs(name)` says what
    flows into it. Raises FormatError naming the tensor that a format cannot hold.
    """

    def __init__(
        self,
        original: Mapping[str, Weight | Float32],
        values: Callable[[str], Float32],
        inputs: KnownInputs,
        memory: int = 1 << 31,
    ) -> None:
        self.original = original
        self._values, self._inputs, self._memory = values, inputs, memory
        self._kept: OrderedDict[tuple[str, Choice], Weight] = OrderedDict()
        self._bytes = 0
        self._last: tuple[str, Float32] | None = None

    def values(self, name: str) -> Float32:
        """The matrix as float32; the one asked for last is kept, since its choices are packed one after another."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self._values(name))
        return self._last[1]

    def inputs(self, name: str) -> Inputs:
        return self._inputs(name) or methods.NOTHING

    def pack(self, name: str, choice: Choice) -> Weight:
        if choice.is_original:
            found = self.original[name]
            assert isinstance(found, Weight), name
            return found
        key = (name, choice)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            weight = methods.apply(choice.method, self.values(name), formats.get(choice.format), self.inputs(name))
        except FormatError as error:
            raise FormatError(f"{name}: {error.message}", error.hint) from None
        self._kept[key] = weight
        self._bytes += weight.nbytes
        while self._bytes > self._memory and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return weight

    def error(self, name: str, choice: Choice) -> float:
        """The output's expected squared error: d H d^T of the difference's rows, or sum_ij m_j d_ij^2 without H."""
        inputs = self.inputs(name)
        difference = self.pack(name, choice).dense() - self.values(name)
        if inputs.hessian is not None:
            return float(loss(difference, inputs.hessian).sum())
        moments = inputs.moments
        columns = np.einsum("ij,ij->j", difference, difference, dtype=np.float64)
        return float(columns.sum() if moments is None else columns @ moments)

    def model(
        self, choices: Mapping[str, Choice], report: Report | None = None, stage: str = "packing"
    ) -> dict[str, Weight | Float32]:
        """All of the model's weights, with the chosen matrices replaced."""
        weights = dict(self.original)
        for done, (name, choice) in enumerate(choices.items()):
            if report:
                report(stage, done, len(choices))
            weights[name] = self.pack(name, choice)
        if report:
            report(stage, len(choices), len(choices))
        return weights


def needs(choices: Mapping[str, Choice]) -> dict[str, methods.Needs]:
    """Matrix -> what its method must be told of its inputs, for those that are to change."""
    return {name: methods.get(c.method).NEEDS for name, c in choices.items() if not c.is_original}
