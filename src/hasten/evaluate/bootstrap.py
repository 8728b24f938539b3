"""Intervals for means over text, by resampling blocks of it (Künsch 1989; Efron and Tibshirani 1993, ch. 8).

Neighbouring tokens are alike, so tokens are not resampled one by one but in blocks of consecutive ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = Sequence[npt.NDArray[np.floating]]
"""One array a window: a value for each scored token."""

BLOCK_TOKENS = 128
FEWEST_BLOCKS = 20
RESAMPLES = 5000


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval, of 95% where no other level was asked for."""

    estimate: float
    low: float
    high: float


def blocks(values: Values) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(sum [blocks], count [blocks]): runs of up to 128 tokens that cross no window, shorter where text is short."""
    total = sum(len(window) for window in values)
    size = max(1, min(BLOCK_TOKENS, total // FEWEST_BLOCKS))
    runs = [w[i : i + size] for w in values for i in range(0, len(w), size)]
    sums = np.array([np.sum(run, dtype=np.float64) for run in runs])
    return sums, np.array([len(run) for run in runs], dtype=np.float64)


def interval(
    values: Values,
    transform: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The `level` interval of the mean over tokens, shown through a monotonic `transform` (np.exp for perplexity).

    Deterministic: the resampling has its own seed. One block alone says nothing of its spread: both ends are infinite.
    """
    sums, counts = blocks(values)
    number = len(sums)
    show = transform or (lambda x: x)
    estimate = float(show(np.asarray(sums.sum() / counts.sum())))
    if number < 2:
        return Interval(estimate, -np.inf, np.inf)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, RESAMPLES, 500):
        times = random.multinomial(number, np.full(number, 1 / number), size=min(500, RESAMPLES - start))
        means.append((times @ sums) / (times @ counts))  # times: [resamples, blocks]
    # Resampling n blocks spreads by sqrt((n - 1) / n) too little.
    centre = sums.sum() / counts.sum()
    spread = centre + (np.concatenate(means) - centre) * np.sqrt(number / (number - 1))
    low, high = np.sort(show(np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])))
    return Interval(estimate, float(low), float(high))
