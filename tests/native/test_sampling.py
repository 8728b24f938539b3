"""Sampling against a statement of its semantics in NumPy, written from the design and not from the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

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
    typical_p: float = 1.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    position: int = 0


NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Edits:
    """What changes logits before anything filters them."""

    history: np.ndarray = field(default_factory=lambda: NOTHING)
    prompt_length: int = 0
    bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None


UNEDITED = Edits()


def adjusted(logits, how: How, edits: Edits):
    x = logits.copy()
    for token, value in edits.bias:
        x[token] += np.float32(value)
    for token in set(edits.history.tolist()):
        x[token] = x[token] / np.float32(how.repetition) if x[token] > 0 else x[token] * np.float32(how.repetition)
    output = edits.history[edits.prompt_length :].tolist()
    for token in set(output):
        x[token] -= np.float32(how.frequency) * np.float32(output.count(token))
        x[token] -= np.float32(how.presence)
    x[list(edits.banned)] = -np.inf
    if edits.allowed is not None:
        x[[t for t in range(len(x)) if t not in set(edits.allowed)]] = -np.inf
    return x


def kept(x, how: How):
    """Ids that the filters leave, of edited logits."""
    wide = x.astype(np.float64) / float(np.float32(how.temperature))
    order = sorted((i for i in range(len(x)) if x[i] > -np.inf), key=lambda i: (-x[i], i))
    if how.top_k:
        order = order[: how.top_k]
    e = np.exp(wide[order] - wide[order[0]])
    if how.top_p < 1:
        reached = np.flatnonzero(np.cumsum(e) >= float(np.float32(how.top_p)) * e.sum())
        order = order[: int(reached[0]) + 1]
    order = [i for i, v in zip(order, e, strict=False) if v >= float(np.float32(how.min_p))]
    if how.typical_p < 1:
        # Meister et al. 2022, equation 5: by distance of the information from its expectation.
        p = np.exp(wide[order]) / np.exp(wide[order]).sum()
        distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
        by_distance = np.argsort(distance, kind="stable")
        reached = np.flatnonzero(np.cumsum(p[by_distance]) >= float(np.float32(how.typical_p)))
        last = int(reached[0]) + 1 if len(reached) else len(order)
        order = [order[j] for j in by_distance[:last]]
    return order


def expected_token(logits, how: How, edits: Edits = UNEDITED):
    x = adjusted(logits, how, edits)
    if how.temperature == 0:
        return int(np.argmax(x))
    scale = float(np.float32(how.temperature))
    return max(kept(x, how), key=lambda i: float(x[i]) / scale + gumbel(how.seed, how.position, i))


def bits(tokens, n):
    """The bitmask of allowed tokens."""
    mask = np.zeros((n + 31) // 32, np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def draw(isa, logits, how: How, edits: Edits = UNEDITED, top=0):
    return _native.ops_sample(
        isa,
        logits,
        **vars(how),
        history=edits.history,
        prompt_length=edits.prompt_length,
        bias_tokens=np.array([t for t, _ in edits.bias], np.int32),
        bias=np.array([v for _, v in edits.bias], np.float32),
        banned=np.array(edits.banned, np.int32),
        allowed=None if edits.allowed is None else bits(edits.allowed, len(logits)),
        top=top,
    )


def sample(isa, logits, how: How, edits: Edits = UNEDITED):
    return draw(isa, logits, how, edits)[:2]


def top_logprobs(isa, logits, count):
    return draw(isa, logits, How(temperature=0.0), top=count)[2:]


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
    How(typical_p=0.2),
    How(typical_p=0.7, temperature=1.4),
    How(typical_p=0.95, top_p=0.9),
    How(typical_p=0.5, top_k=30, top_p=0.9, min_p=0.01),
    How(typical_p=0.0),
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
        assert token == expected_token(logits, drawn)
        wide = logits.astype(np.float64)
        assert logprob == pytest.approx(wide[token] - np.log(np.exp(wide).sum()), abs=2e-6)


@isas
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("how", [FILTERS[1], FILTERS[2], FILTERS[14]], ids=repr)
def test_penalties(isa, penalty, how):
    both = replace(how, repetition=penalty.repetition, presence=penalty.presence, frequency=penalty.frequency)
    rng = np.random.default_rng(4)
    for seed in range(20):
        logits = random_logits(seed, 60, spread=1)
        history = rng.integers(0, 60, 50).astype(np.int32)
        for prompt_length in (0, 20, 50):
            drawn = replace(both, seed=seed)
            token, logprob = sample(isa, logits, drawn, Edits(history, prompt_length))
            assert token == expected_token(logits, drawn, Edits(history, prompt_length))
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
    tokens, _ = top_logprobs(isa, logits, 6)
    assert tokens.tolist() == [7, 50, 51, 260, 0, 1]


@isas
@pytest.mark.parametrize("n", [1, 20, 700, 5001])
@pytest.mark.parametrize("count", [1, 5, 20, 600])
def test_top_logprobs(isa, n, count):
    logits = np.round(random_logits(n, n), 1)  # ties
    tokens, values = top_logprobs(isa, logits, count)
    order = sorted(range(n), key=lambda i: (-logits[i], i))[:count]
    assert tokens.tolist() == order
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(values, wide[order] - np.log(np.exp(wide).sum()), atol=2e-6)


@isas
def test_chosen_logprob_is_the_identical_float(isa):
    logits = random_logits(3, 4000)
    tokens, values = top_logprobs(isa, logits, 4000)
    by_token = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    for how in FILTERS:
        token, logprob = sample(isa, logits, how)
        assert logprob == by_token[token]


@pytest.mark.parametrize(
    "how", [How(), How(temperature=1.7), How(top_k=6), How(top_p=0.8), How(min_p=0.1), How(typical_p=0.6)], ids=repr
)
def test_draws_follow_the_distribution(how):
    """Chi-square over keys that differ in seed or position: fails 1 in 10^5 by chance, and the keys are fixed."""
    logits, draws = random_logits(8, 24, spread=1), 6000
    ids = kept(logits, how)
    e = np.exp(logits[ids].astype(np.float64) / how.temperature)
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


LARGE = [
    How(),
    How(temperature=0.8, top_k=40, top_p=0.95),
    How(top_p=0.95),
    How(top_p=0.5, temperature=2.0),
    How(top_p=0.999, min_p=0.01),
    How(top_k=50, temperature=0.8),
    How(top_k=1500),  # more than each piece picks for itself
    How(top_k=20000, top_p=0.9, temperature=1.3),
    How(top_k=151_999),
    How(min_p=0.1),
    How(typical_p=0.9),
    How(typical_p=0.3, temperature=0.7),
    How(top_k=3000, top_p=0.8, min_p=0.001, typical_p=0.5),
]


@isas
@pytest.mark.parametrize("how", LARGE, ids=repr)
def test_a_large_vocabulary_is_filtered_right(isa, how):
    """Flat and peaked distributions over 152,000 tokens: few candidates on one thread, many by all."""
    for spread in (0.0, 0.001, 0.1, 2.0, 8.0):
        logits = random_logits(int(spread * 10), 152_000, spread)
        for seed in range(3):
            drawn = replace(how, seed=seed, position=int(spread))
            assert sample(isa, logits, drawn)[0] == fast_statement(logits, drawn)
        logits = np.round(logits, 2)  # ties, at the cuts too
        if how.typical_p == 1:
            assert sample(isa, logits, how)[0] == fast_statement(logits, how)


def fast_statement(logits, how: How):
    """`expected_token` without edits, vectorised."""
    x = logits.astype(np.float64) / float(np.float32(how.temperature))
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[: how.top_k] if how.top_k else order
    e = np.exp(x[order] - x[order[0]])
    reached = np.cumsum(e) >= float(np.float32(how.top_p)) * e.sum()
    size = int(np.argmax(reached)) + 1 if how.top_p < 1 else len(e)
    order = order[:size][e[:size] >= float(np.float32(how.min_p))]
    if how.typical_p < 1:
        p = np.exp(x[order] - x[order[0]])
        p /= p.sum()
        nearest = np.argsort(np.abs(np.log(p) - (p * np.log(p)).sum()), kind="stable")
        order = order[nearest[: int(np.argmax(np.cumsum(p[nearest]) >= float(np.float32(how.typical_p)))) + 1]]
    ids = order.astype(np.uint64)
    key = finalise((finalise((how.seed + GOLDEN) & MASK) + GOLDEN * (how.position + 1)) & MASK)
    h = np.uint64(key) + np.uint64(GOLDEN) * (ids + np.uint64(1))
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    u = (((h ^ (h >> np.uint64(31))) >> np.uint64(11)) | np.uint64(1)) / 2.0**53
    return int(ids[np.argmax(x[ids] - np.log(-np.log(u)))])


def test_typical_is_what_transformers_keeps():
    """The tokens ever drawn are those that its TypicalLogitsWarper leaves."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for spread in (0.5, 2.0):
        logits = random_logits(int(spread * 7), 40, spread)
        for mass in (0.2, 0.6, 0.9):
            warped = transformers.TypicalLogitsWarper(mass)(None, torch.tensor(logits)[None])[0].numpy()
            left = set(np.flatnonzero(warped > -np.inf).tolist())
            drawn = {sample(ISAS[0], logits, How(typical_p=mass, temperature=1.0, seed=s))[0] for s in range(4000)}
            likely = {t for t in left if np.exp(logits[t]) / np.exp(logits[list(left)]).sum() > 0.005}
            assert likely <= drawn <= left


EDITS = [
    Edits(bias=((3, 100.0),)),
    Edits(bias=((3, -100.0), (7, 2.5), (16390, 1.0), (33000, 1.5))),
    Edits(banned=(0, 5, 17000, 39999)),
    Edits(allowed=(1, 2, 31, 32, 16383, 16384, 39999)),
    Edits(allowed=(40000,)),
    Edits(history=np.array([4, 9, 9, 20000, 33000, 4], np.int32), prompt_length=2, bias=((9, 3.0),), banned=(4,)),
]


@isas
@pytest.mark.parametrize("edits", EDITS, ids=repr)
@pytest.mark.parametrize("how", [FILTERS[1], FILTERS[2], FILTERS[5], FILTERS[8], FILTERS[14], FILTERS[17]], ids=repr)
def test_edits_come_before_filters(isa, edits, how):
    logits = random_logits(2, 40001)
    wide = logits.astype(np.float64)
    for seed in range(3):
        drawn = replace(how, seed=seed, repetition=1.2, presence=0.3, frequency=0.1)
        token, logprob = sample(isa, logits, drawn, edits)
        assert token == expected_token(logits, drawn, edits)
        assert logprob == pytest.approx(wide[token] - np.log(np.exp(wide).sum()), abs=2e-6)
    assert sample(isa, logits, FILTERS[2])[0] == expected_token(logits, FILTERS[2])  # nothing is left behind


@isas
@pytest.mark.parametrize("how", FILTERS, ids=repr)
def test_bans_that_leave_nothing(isa, how):
    logits = random_logits(5, 300)
    logits[7], logits[[8, 9]] = -np.inf, np.nan
    assert sample(isa, logits, how, Edits(allowed=(40, 41), banned=(40, 41)))[0] == (
        40 if logits[40] >= logits[41] else 41
    )
    assert sample(isa, logits, how, Edits(banned=tuple(range(300))))[0] == np.nanargmax(logits)
    assert sample(isa, logits, how, Edits(allowed=()))[0] == np.nanargmax(logits)
    assert sample(isa, logits, how, Edits(allowed=(7,)))[0] == 7
    assert sample(isa, np.full(300, -np.inf, np.float32), how, Edits(allowed=(299,)))[0] == 299


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
    tokens, values = top_logprobs(isa, spread, 7)
    wide = spread.astype(np.float64)
    np.testing.assert_allclose(values, wide[tokens] - np.log(np.exp(wide).sum()), atol=2e-6)
    logits[:20000] = -np.inf
    assert sample(isa, logits, How(temperature=0.0))[0] == 20000
    logits[:16384] = np.nan  # never wins
    assert sample(isa, logits, How(temperature=0.0))[0] == 20000


@isas
@pytest.mark.parametrize("vocabulary", [50, 40000])
@pytest.mark.parametrize("how", FILTERS, ids=repr)
def test_an_infinite_logit_is_always_drawn_and_a_nan_never(isa, vocabulary, how):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=vocabulary).astype(np.float32)
    logits[[3, 30]] = np.nan
    for seed in range(20):
        token = sample(isa, logits, replace(how, seed=seed))[0]
        assert 0 <= token < vocabulary
        assert token not in (3, 30)
    logits[17] = np.inf
    assert {sample(isa, logits, replace(how, seed=seed))[0] for seed in range(20)} == {17}
