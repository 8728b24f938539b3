"""Sampling against a statement of its semantics in NumPy, written from the design and not from the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from hasten import _native

ISAS = _native.available_isas()
isas = pytest.mark.parametrize("isa", ISAS)
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def finalise(x: int) -> int:
    """splitmix64's output function (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def gumbel(seed: int, position: int, token: int) -> float:
    key = finalise((finalise((seed + GOLDEN) & MASK) + GOLDEN * (position + 1)) & MASK)
    u = ((finalise((key + GOLDEN * (token + 1)) & MASK) >> 11) | 1) / 2**53
    return -math.log(-math.log(u))


@dataclass(frozen=True)
class How:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    position: int = 0


def adjusted(logits, how: How, history, prompt_length):
    x = logits.copy()
    for token in set(history.tolist()):
        x[token] = x[token] / np.float32(how.repetition) if x[token] > 0 else x[token] * np.float32(how.repetition)
    output = history[prompt_length:].tolist()
    for token in set(output):
        x[token] -= np.float32(how.frequency) * np.float32(output.count(token))
        x[token] -= np.float32(how.presence)
    return x


def kept(x, how: How):
    """Ids that the filters leave, of logits already divided by the temperature."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if how.top_k:
        order = order[: how.top_k]
    e = np.exp(x[order].astype(np.float64) - float(x[order[0]]))
    if how.top_p < 1:
        reached = np.flatnonzero(np.cumsum(e) >= float(np.float32(how.top_p)) * e.sum())
        order = order[: int(reached[0]) + 1]
    return [i for i, v in zip(order, e, strict=False) if v >= how.min_p]


def expected_token(logits, how: How, history, prompt_length):
    x = adjusted(logits, how, history, prompt_length)
    if how.temperature == 0:
        return int(np.argmax(x))
    x = x / np.float32(how.temperature)
    return max(kept(x, how), key=lambda i: float(x[i]) + gumbel(how.seed, how.position, i))


NOTHING = np.zeros(0, np.int32)


def sample(isa, logits, how: How, history=NOTHING, prompt_length=0):
    return _native.ops_sample(isa, logits, **vars(how), history=history, prompt_length=prompt_length)


def random_logits(seed, n, spread=3.0):
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


FILTERS = [
    How(),
    How(temperature=0.0),
    How(temperature=0.6),
    How(temperature=2.5),
    How(top_k=1),
    How(top_k=5, temperature=1.3),
    How(top_k=40),
    How(top_k=100000),
    How(top_p=0.9),
    How(top_p=0.3, temperature=0.7),
    How(top_p=0.9999),
    How(top_p=0.0),
    How(min_p=0.05),
    How(min_p=0.3, temperature=1.5),
    How(top_k=20, top_p=0.8, min_p=0.02, temperature=0.9),
]
PENALTIES = [
    How(),
    How(repetition=1.3),
    How(presence=0.7),
    How(frequency=0.4),
    How(repetition=0.8, presence=-0.5, frequency=0.9),
]


@isas
@pytest.mark.parametrize("how", FILTERS, ids=repr)
@pytest.mark.parametrize("n", [1, 3, 200, 3001])
def test_equals_its_statement(isa, how, n):
    logits = random_logits(n, n)
    for seed in range(8):
        drawn = replace(how, seed=seed * 0x9876543210FEDCB % 2**64, position=3 * seed)
        token, logprob = sample(isa, logits, drawn)
        assert token == expected_token(logits, drawn, NOTHING, 0)
        wide = logits.astype(np.float64)
        assert logprob == pytest.approx(wide[token] - np.log(np.exp(wide).sum()), abs=2e-6)


@isas
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("how", [FILTERS[1], FILTERS[2], FILTERS[-1]], ids=repr)
def test_penalties(isa, penalty, how):
    both = replace(how, repetition=penalty.repetition, presence=penalty.presence, frequency=penalty.frequency)
    rng = np.random.default_rng(4)
    for seed in range(20):
        logits = random_logits(seed, 60, spread=1)
        history = rng.integers(0, 60, 50).astype(np.int32)
        for prompt_length in (0, 20, 50):
            drawn = replace(both, seed=seed)
            token, logprob = sample(isa, logits, drawn, history, prompt_length)
            assert token == expected_token(logits, drawn, history, prompt_length)
            # Reported of the model's own distribution, whatever the penalties did.
            wide = logits.astype(np.float64)
            assert logprob == pytest.approx(wide[token] - np.log(np.exp(wide).sum()), abs=2e-6)


@isas
def test_ties_go_to_the_lower_id(isa):
    logits = np.zeros(300, np.float32)
    logits[[7, 50, 51, 260]] = 2
    logits[50] = logits[7]
    assert sample(isa, logits, How(temperature=0.0))[0] == 7
    assert {sample(isa, logits, How(top_k=2, seed=s))[0] for s in range(60)} == {7, 50}
    assert {sample(isa, logits, How(top_k=4, seed=s))[0] for s in range(100)} == {7, 50, 51, 260}
    zeros = np.array([-0.0, 0.0, -0.0, 0.0], np.float32)
    assert {sample(isa, zeros, How(top_k=2, seed=s))[0] for s in range(60)} == {0, 1}
    tokens, _ = _native.ops_top_logprobs(isa, logits, 6)
    assert tokens.tolist() == [7, 50, 51, 260, 0, 1]


@isas
@pytest.mark.parametrize("n", [1, 20, 700, 5001])
@pytest.mark.parametrize("count", [1, 5, 20, 600])
def test_top_logprobs(isa, n, count):
    logits = np.round(random_logits(n, n), 1)  # ties
    tokens, values = _native.ops_top_logprobs(isa, logits, count)
    order = sorted(range(n), key=lambda i: (-logits[i], i))[:count]
    assert tokens.tolist() == order
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(values, wide[order] - np.log(np.exp(wide).sum()), atol=2e-6)


@isas
def test_chosen_logprob_is_the_identical_float(isa):
    logits = random_logits(3, 4000)
    tokens, values = _native.ops_top_logprobs(isa, logits, 4000)
    by_token = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    for how in FILTERS:
        token, logprob = sample(isa, logits, how)
        assert logprob == by_token[token]


@pytest.mark.parametrize("how", [How(), How(temperature=1.7), How(top_k=6), How(top_p=0.8), How(min_p=0.1)], ids=repr)
def test_draws_follow_the_distribution(how):
    """Chi-square over keys that differ in seed or position: fails 1 in 10^5 by chance, and the keys are fixed."""
    logits, draws = random_logits(8, 24, spread=1), 6000
    x = logits / np.float32(how.temperature)
    ids = kept(x, how)
    e = np.exp(x[ids].astype(np.float64))
    for key in ("seed", "position"):
        counts = np.zeros(len(logits))
        for i in range(draws):
            counts[sample(ISAS[0], logits, replace(how, **{key: i}))[0]] += 1
        expected = draws * e / e.sum()
        assert counts[ids].sum() == draws
        statistic = ((counts[ids] - expected) ** 2 / expected).sum()
        degrees = len(ids) - 1
        # Wilson and Hilferty's normal approximation of chi-square.
        z = ((statistic / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
        assert z < 4.3


@isas
def test_a_large_vocabulary_is_filtered_right(isa):
    """Flat and peaked distributions over 152,000 tokens, where selection works in more than one pass."""
    for spread in (0.1, 2.0, 8.0):
        logits = random_logits(int(spread * 10), 152_000, spread)
        for how in (
            How(seed=5),
            How(seed=6, top_p=0.95),
            How(seed=7, top_k=50, temperature=0.8),
            How(seed=8, min_p=0.1),
        ):
            assert sample(isa, logits, how)[0] == fast_statement(logits, how)


def fast_statement(logits, how: How):
    """`expected_token` without penalties, vectorised."""
    x = logits / np.float32(how.temperature)
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[: how.top_k] if how.top_k else order
    e = np.exp(x[order].astype(np.float64) - float(x[order[0]]))
    reached = np.cumsum(e) >= float(np.float32(how.top_p)) * e.sum()
    size = int(np.argmax(reached)) + 1 if how.top_p < 1 else len(e)
    ids = order[:size][e[:size] >= how.min_p].astype(np.uint64)
    key = finalise((finalise((how.seed + GOLDEN) & MASK) + GOLDEN * (how.position + 1)) & MASK)
    h = np.uint64(key) + np.uint64(GOLDEN) * (ids + np.uint64(1))
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    u = (((h ^ (h >> np.uint64(31))) >> np.uint64(11)) | np.uint64(1)) / 2.0**53
    return int(ids[np.argmax(x[ids].astype(np.float64) - np.log(-np.log(u)))])


@isas
def test_impossible_tokens_are_never_drawn(isa):
    logits = np.full(50, -np.inf, np.float32)
    logits[[13, 29]] = -4, -5
    for how in (How(), How(top_k=30), How(top_p=0.99), How(min_p=0.01)):
        assert {sample(isa, logits, replace(how, seed=s))[0] for s in range(50)} <= {13, 29}
    logits[[13, 29]] = np.nan, 1
    for how in FILTERS:
        assert sample(isa, logits, how)[0] == 29
    for how in FILTERS:  # no distribution at all: still a token of the vocabulary
        assert 0 <= sample(isa, np.full(50, np.nan, np.float32), how)[0] < 50
        assert 0 <= sample(isa, np.full(50, -np.inf, np.float32), how)[0] < 50


@isas
def test_a_vocabulary_of_several_pieces(isa):
    """Reductions go by pieces of 16384: sums and ties are the whole's."""
    logits = random_logits(8, 40001)
    logits[[20000, 30000, 40000]] = 50  # alone they would hide a piece that was left out of the sum
    logits[5] = 49
    wide = logits.astype(np.float64)
    total = np.log(np.exp(wide - 50).sum()) + 50
    token, logprob = sample(isa, logits, How(temperature=0.0))
    assert token == 20000
    assert logprob == pytest.approx(50 - total, abs=2e-6)
    spread = random_logits(9, 40001, spread=0.1)
    tokens, values = _native.ops_top_logprobs(isa, spread, 7)
    wide = spread.astype(np.float64)
    np.testing.assert_allclose(values, wide[tokens] - np.log(np.exp(wide).sum()), atol=2e-6)
    logits[:20000] = -np.inf
    assert sample(isa, logits, How(temperature=0.0))[0] == 20000
    logits[:16384] = np.nan  # never wins
    assert sample(isa, logits, How(temperature=0.0))[0] == 20000
