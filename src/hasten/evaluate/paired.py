"""Two models on the same tokens or questions: how much worse is one, and how sure is that."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from hasten.evaluate.bootstrap import Interval, Values, interval


def difference(original: Values, candidate: Values, seed: int = 0, level: float = 0.95) -> Interval:
    """The ratio perplexity(candidate) / perplexity(original), with its interval.

    Both are log-probabilities of the same tokens, one array a window. What is resampled is the difference token by
    token, so what makes a text hard for both models cancels, and the interval is far narrower than either model's own.
    """
    if [len(w) for w in original] != [len(w) for w in candidate]:
        raise ValueError("paired log-probabilities must be of the same tokens")
    worse = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(original, candidate, strict=True)]
    return interval(worse, np.exp, seed, level)


def accuracy_lost(original: npt.NDArray[np.bool_], candidate: npt.NDArray[np.bool_], level: float = 0.95) -> Interval:
    """Accuracy of the original less the candidate's on the same questions, with its interval.

    Only questions that one of them answers right count (McNemar); the interval adds half a question to each kind of
    pair (Agresti and Min 2005), so that it is no point where both answer alike.
    """
    if original.shape != candidate.shape:
        raise ValueError("paired answers must be to the same questions")
    lost = int(np.count_nonzero(original & ~candidate))
    won = int(np.count_nonzero(candidate & ~original))
    number = len(original)
    centre = (lost - won) / (number + 2)
    half = _deviations(level) * math.sqrt(lost + won + 1 - (lost - won) ** 2 / (number + 2)) / (number + 2)
    return Interval((lost - won) / number, centre - half, centre + half)


def fewest_questions(loss: float, level: float = 0.95) -> int:
    """How many it takes for the interval of a model that answers just as the original does to stay within `loss`."""
    return max(1, math.ceil(_deviations(level) / loss - 2))


def _deviations(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
