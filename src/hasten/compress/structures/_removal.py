"""Input features of a matrix removed a few at a time, those that stay making up for them by least squares."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from hasten.compress.structures import Float32, Float64

Score = Literal["repair", "energy"]
"""What removing features does to the output: after the repair of what stays, or without any."""
Index = npt.NDArray[np.intp]
DAMPING = 1e-3


def damped(hessian: Float64, damping: float = DAMPING) -> Float64:
    """H + damping * mean(diag H) I: a penalty on moving away from the weights as they are, where data says nothing."""
    mean = float(np.diagonal(hessian).mean())
    made: Float64 = hessian + np.eye(len(hessian)) * damping * (mean if mean > 0 else 1.0)
    return made


class Removal:
    """Optimal Brain Surgeon for whole columns (Hassibi and Stork 1992; in groups: Kurtic et al. 2023,
    arXiv:2302.04089).

    With F = H⁻¹ over what is left, removing columns R costs tr(W_R F_RR⁻¹ W_Rᵀ) in the output's mean squared error, and
    the best weights of the others are W - W_R F_RR⁻¹ F_R:. Both W and F are kept up to date, so that however many
    steps were taken, W is the least-squares solution for the columns that are left.
    """

    def __init__(self, values: Float32, hessian: Float64, damping: float = DAMPING) -> None:
        self._hessian = hessian  # [in, in]
        self.weights = values.astype(np.float64)  # [out, in]
        self._inverse = np.linalg.inv(damped(hessian, damping))  # [in, in]

    def costs(self, groups: Index, score: Score) -> Float64:
        """[groups] what removing each group of columns [groups, size] alone would add to the mean squared error."""
        if groups.shape[1] == 1:
            columns = groups[:, 0]
            size = np.einsum("oc,oc->c", self.weights[:, columns], self.weights[:, columns])
            diagonal = np.diagonal(self._hessian if score == "energy" else self._inverse)[columns]
            return np.asarray(size * diagonal if score == "energy" else size / diagonal)
        found = []
        for group in groups:
            within = np.ix_(group, group)
            part = self.weights[:, group]  # [out, size]
            gram = part.T @ part
            matrix = self._hessian[within] if score == "energy" else np.linalg.inv(self._inverse[within])
            found.append(float(np.sum(gram * matrix)))
        return np.array(found)

    def remove(self, columns: Index) -> float:
        """Take these columns out and repair the others. They are zero from now on.

        Returns what that adds to the output's mean squared error.
        """
        across, gone = self._inverse[columns], self.weights[:, columns]  # [removed, in], [out, removed]
        step = np.linalg.solve(across[:, columns], across)  # F_RR⁻¹ F_R:
        cost = float(np.sum(gone * np.linalg.solve(across[:, columns], gone.T).T))
        self.weights -= gone @ step
        self._inverse -= across.T @ step
        self.weights[:, columns] = 0.0
        self._inverse[columns], self._inverse[:, columns] = 0.0, 0.0
        return cost
