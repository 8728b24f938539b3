"""Methods that change a model's shape: blocks, heads and channels removed, matrices factored. One a file.

A method is a module with
    def restructure(graph, read, hessians, amount, ...) -> Change
where `read(name)` gives a matrix or vector of the graph as float32, `hessians` maps a weight's name to the mean of
x xᵀ over its inputs [in, in], and `amount` says how much stays, in the method's own terms. A Change is the Structure
that leads from `graph` to the new one, and the weights that are new or differ, as float32.

They stand apart from compress/methods, which choose numbers that a format stores: those keep every shape and know
nothing of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hasten.errors import InputError
from hasten.graph.structure import Structure

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Read = Callable[[str], Float32]
Hessians = Mapping[str, Float64]
Change = tuple[Structure, dict[str, Float32]]


def checked(name: str, values: Float32, hessian: Float64) -> Float64:
    """The mean of x xᵀ over the inputs of matrix `name`, symmetric to the bit. Raises InputError where it is none."""
    width = values.shape[1]
    if hessian.shape != (width, width):
        raise InputError(f"{name}: second moments are {list(hessian.shape)}, must be {[width, width]}")
    if not np.isfinite(hessian).all():
        raise InputError(f"{name}: second moments of its inputs hold a NaN or an infinity", "calibrate on another text")
    if (np.diagonal(hessian) < 0).any():
        raise InputError(f"{name}: second moments of its inputs are negative")
    made: Float64 = (hessian + hessian.T) / 2
    return made
