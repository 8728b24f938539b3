"""Methods choose the numbers that a format stores. One a file; the file's name is its registration.

A method is a module with
    def supports(format: Format) -> bool
    def apply(values, format, moments=None) -> Weight
where values is float32 [out, in] and moments float [in] the mean square of each input feature (None: all alike).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError, InputError
from hasten.formats import Format, Weight

Float32 = npt.NDArray[np.float32]
Moments = npt.NDArray[np.floating[Any]]


class Method(Protocol):
    def supports(self, format: Format) -> bool: ...
    def apply(self, values: Float32, format: Format, moments: Moments | None = None) -> Weight: ...


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Method:
    """The method called `name`. Raises InputError listing those that exist."""
    if name not in names():
        raise InputError(f"unknown compression method '{name}'", f"known methods: {', '.join(names())}")
    return cast(Method, importlib.import_module(f"{__name__}.{name}"))


def best_for(format: Format) -> str:
    """The method that gives a format its least error: what the search takes."""
    if format.kind.startswith("codebook"):
        return "codebook"
    if format.kind.startswith("sparse"):
        return "prune"
    return "clip" if format.group else "nearest"


def apply(method: str, values: Float32, format: Format, moments: Moments | None = None) -> Weight:
    """values float32 [out, in], moments [in] -> Weight. Raises InputError and FormatError."""
    module = get(method)
    if not module.supports(format):
        raise InputError(f"method '{method}' cannot make {format.name}", f"'{best_for(format)}' can")
    if values.ndim != 2 or (moments is not None and moments.shape != (values.shape[1],)):
        raise FormatError(f"a matrix [out, in] and moments [in] are needed, not {values.shape} and {moments}")
    if not np.isfinite(values).all():
        raise FormatError("values to compress hold a NaN or an infinity")
    return module.apply(values, format, moments)
