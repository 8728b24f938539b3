from __future__ import annotations

import numpy as np
import pytest

from hasten.evaluate.bootstrap import interval
from hasten.evaluate.paired import difference


def correlated(random: np.random.Generator, windows: int, length: int, mean: float) -> list[np.ndarray]:
    """Autoregressive noise around `mean`: neighbours alike, as the surprises of neighbouring tokens are."""
    values = []
    for _ in range(windows):
        x, row = random.normal() / np.sqrt(1 - 0.7**2), []
        for _ in range(length):
            x = 0.7 * x + random.normal()
            row.append(mean + x)
        values.append(np.array(row))
    return values


def test_the_estimate_is_the_mean_over_tokens_not_over_windows() -> None:
    values = [np.full(30, 1.0), np.full(10, 5.0)]
    assert interval(values).estimate == pytest.approx((30 * 1 + 10 * 5) / 40)
    assert interval(values, np.exp).estimate == pytest.approx(np.exp(2.0))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = interval(correlated(random, 4, 700, 3.0), seed=trial)
        hits += found.low <= 3.0 <= found.high
    # Binomial(200, 0.95) has a standard deviation of 3.1. Resampling single tokens covers but 60%.
    assert 178 <= hits <= 199


def test_the_width_shrinks_as_text_grows_and_order_holds() -> None:
    random = np.random.default_rng(2)
    short, long = (interval(correlated(random, n, 512, 2.0), np.exp) for n in (4, 64))
    for found in (short, long):
        assert found.low < found.estimate < found.high
    assert (long.high - long.low) < 0.4 * (short.high - short.low)


def test_a_single_token_says_nothing_of_its_spread() -> None:
    found = interval([np.array([2.0])], np.exp)
    assert found.estimate == pytest.approx(np.exp(2.0))
    assert (found.low, found.high) == (-np.inf, np.inf)


def test_intervals_repeat() -> None:
    values = correlated(np.random.default_rng(3), 2, 300, 1.0)
    assert interval(values) == interval(values)


def test_pairing_cancels_what_is_hard_for_both() -> None:
    random = np.random.default_rng(4)
    hard = correlated(random, 6, 512, -3.0)
    candidate = [w - 0.01 + 0.02 * random.normal(size=len(w)) for w in hard]
    found = difference(hard, candidate)
    expected = np.exp(-np.concatenate(candidate).mean()) / np.exp(-np.concatenate(hard).mean())
    assert found.estimate == pytest.approx(expected)
    assert found.low < np.exp(0.01) < found.high
    alone = interval([-w for w in candidate], np.exp)
    assert (found.high - found.low) / found.estimate < 0.1 * (alone.high - alone.low) / alone.estimate


def test_pairing_refuses_other_tokens() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        difference([np.zeros(3)], [np.zeros(4)])
