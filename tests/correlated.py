"""Matrices and inputs as layers have them: heavy tails, correlated features of very different sizes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def layer(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], Float64]:
    """(values [rows, columns], inputs [tokens, columns]); more tokens begin with the same ones."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_t(4, (rows, columns)) / columns**0.5).astype(np.float32)
    mix = rng.normal(size=(columns, columns)) * (rng.uniform(size=(columns, columns)) < 0.1) + np.eye(columns)
    sizes = np.exp(rng.normal(size=columns))
    return values, rng.normal(size=(tokens, columns)) @ mix * sizes


def hessian(inputs: Float64) -> Float64:
    """Mean of x xᵀ."""
    return inputs.T @ inputs / len(inputs)


def error(difference: npt.NDArray[np.floating], inputs: Float64) -> float:
    """Mean over tokens of the squared error at the output, summed over its features."""
    return float(((inputs @ difference.T) ** 2).sum(axis=1).mean())
