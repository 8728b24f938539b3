"""Two models on the same tokens: how much worse is one, and how sure is that."""

from __future__ import annotations

import numpy as np

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
