"""Methods choose the numbers that a format stores. One a file; the file's name is its registration.

A method is a module with
    NEEDS: "nothing", "moments", "hessian" or "gradients": what it must be told of the matrix's inputs
    def supports(format: Format) -> bool
    def apply(values, format, inputs) -> Weight
where values is float32 [out, in] and inputs an `Inputs` that has what NEEDS names.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError, InputError
from hasten.formats import Format, Weight

Float32 = npt.NDArray[np.float32]
Moments = npt.NDArray[np.floating[Any]]
Needs = Literal["nothing", "moments", "hessian", "gradients"]


@dataclass(frozen=True)
class Inputs:
    """What flows into a matrix [out, in], over the calibration text."""

    moments: Moments | None = None
    """[in] mean square of each feature; None: all alike."""
    magnitudes: Moments | None = None
    """[in] mean absolute value."""
    peaks: Moments | None = None
    """[in] largest absolute value."""
    hessian: npt.NDArray[Any] | None = field(default=None, repr=False)
    """[in, in] mean of x xᵀ: half the Hessian of the layer's squared error."""
    gradients: npt.NDArray[Any] | None = field(default=None, repr=False)
    """[out, in] mean square of the loss's gradient at each weight."""


NOTHING = Inputs()


class Method(Protocol):
    NEEDS: Needs

    def supports(self, format: Format) -> bool: ...
    def apply(self, values: Float32, format: Format, inputs: Inputs) -> Weight: ...


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Method:
    """The method called `name`. Raises InputError listing those that exist."""
    if name not in names():
        raise InputError(f"unknown compression method '{name}'", f"known methods: {', '.join(names())}")
    return cast(Method, importlib.import_module(f"{__name__}.{name}"))


def best_for(format: Format, hessian: bool = True) -> str:
    """The method that gives a format its least error at the layer's output, with second moments at hand or without."""
    if format.kind.startswith("sparse"):
        return "sparsegpt" if hessian else "wanda"
    if format.kind.startswith("codebook"):
        return "gptq" if hessian else "codebook"
    if not format.group:
        return "nearest"
    return "gptq" if hessian and format.kind != "int8" else "clip"


def apply(method: str, values: Float32, format: Format, inputs: Inputs = NOTHING) -> Weight:
    """values float32 [out, in] -> Weight. Raises InputError where the method cannot make the format or lacks what it
    needs, FormatError where values or statistics are no numbers or do not fit."""
    module = get(method)
    if not module.supports(format):
        raise InputError(f"method '{method}' cannot make {format.name}", f"'{best_for(format)}' can")
    if values.ndim != 2:
        raise FormatError(f"a matrix [out, in] is needed, not {values.shape}")
    if not np.isfinite(values).all():
        raise FormatError("values to compress hold a NaN or an infinity")
    _check(method, module.NEEDS, values, inputs)
    return module.apply(values, format, inputs)


def _check(method: str, needs: Needs, values: Float32, inputs: Inputs) -> None:
    rows, columns = values.shape
    shapes: dict[str, tuple[int, ...]] = {"moments": (columns,), "magnitudes": (columns,), "peaks": (columns,)}
    shapes |= {"hessian": (columns, columns), "gradients": (rows, columns)}
    for name, shape in shapes.items():
        found = getattr(inputs, name)
        if found is not None and found.shape != shape:
            raise FormatError(
                f"{name} are {list(found.shape)}, must be {list(shape)} for a matrix {list(values.shape)}"
            )
        if found is not None and name in ("moments", needs) and not np.isfinite(found).all():
            raise FormatError(f"{name} of the matrix's inputs hold a NaN or an infinity", "calibrate on another text")
    if needs in ("hessian", "gradients") and getattr(inputs, needs) is None:
        raise InputError(f"method '{method}' needs the {needs} of the matrix's inputs, which were not gathered")
