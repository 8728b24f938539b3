"""Paged attention of every instruction set against a plain float64 softmax, and its exactness bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from hasten import _native

ISAS = _native.available_isas()
isas = pytest.mark.parametrize("isa", ISAS)


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    kv: str = "f32"
    query_tile: int = 16

    @property
    def scale(self) -> float:
        return 1.7 / self.head_dim**0.5


def to_bf16(x):
    """float32 -> the nearest bfloat16's bits, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Cache:
    """Blocks in shuffled order; whatever is not written is NaN."""

    def __init__(self, case: Case, sequences: int, context: int, seed: int = 5) -> None:
        per_sequence = -(-context // case.block_size)
        blocks = sequences * per_sequence + 3
        order = np.random.default_rng(seed).permutation(blocks)[: sequences * per_sequence]
        self.tables = order.reshape(sequences, per_sequence).astype(np.int32)
        shape = (blocks, case.kv_heads, case.head_dim, case.block_size)
        nan = np.float32(np.nan) if case.kv == "f32" else np.uint16(0x7FFF)
        self.keys = np.full(shape, nan)
        self.values = np.full((*shape[:2], shape[3], shape[2]), nan)


def step(isa, case: Case, cache: Cache, parts):
    """One step. parts: (sequence, first position, q, k, v) -> the outputs of each part."""
    q, k, v = (np.ascontiguousarray(np.concatenate([p[i] for p in parts])) for i in (2, 3, 4))
    positions = np.concatenate([np.arange(p[1], p[1] + len(p[2])) for p in parts]).astype(np.int32)
    starts = np.cumsum([0, *(len(p[2]) for p in parts)]).astype(np.int32)
    tables = np.ascontiguousarray(cache.tables[[p[0] for p in parts]])
    run = _native.ops_attention if case.kv == "f32" else _native.ops_attention_bf16
    out = run(
        isa, q, k, v, cache.keys, cache.values, positions, starts, tables,
        case.scale, case.softcap, case.window, case.causal, case.query_tile,
    )  # fmt: skip
    return np.split(np.asarray(out), starts[1:-1])


def sequence(case: Case, length: int, seed: int = 1):
    rng = np.random.default_rng(seed)
    sizes = (case.heads, case.kv_heads, case.kv_heads)
    return tuple(rng.standard_normal((length, n, case.head_dim)).astype(np.float32) for n in sizes)


def plain(case: Case, q, k, v):
    """softmax(mask(cap(scale q k^T))) v in float64, keys and values as the cache holds them."""
    if case.kv == "bf16":
        k, v = from_bf16(to_bf16(k)), from_bf16(to_bf16(v))
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, case.heads // case.kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * case.scale
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    i, j = np.arange(len(q))[:, None], np.arange(len(k))[None, :]
    unseen = (j > i) & case.causal
    if case.window:
        unseen |= j <= i - case.window
    scores[:, unseen] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)


def run_chunks(isa, case: Case, data, chunks):
    """The sequence fed in chunks of these lengths into an empty cache -> its output."""
    cache = Cache(case, 1, sum(chunks))
    out, begin = [], 0
    for size in chunks:
        part = tuple(x[begin : begin + size] for x in data)
        out += step(isa, case, cache, [(0, begin, *part)])
        begin += size
    return np.concatenate(out)


CASES = [
    Case(),
    Case(heads=1, kv_heads=1, head_dim=8),
    Case(heads=3, kv_heads=3, head_dim=24, block_size=32),
    Case(heads=14, kv_heads=2, head_dim=64, block_size=32),
    Case(heads=8, kv_heads=1, head_dim=40, block_size=48),
    Case(heads=9, kv_heads=1, head_dim=100),
    Case(heads=6, kv_heads=3, head_dim=128, block_size=32, query_tile=5),
    Case(window=1),
    Case(window=7),
    Case(window=16, query_tile=40),
    Case(window=37, block_size=32, heads=2, kv_heads=2),
    Case(softcap=1.5),
    Case(softcap=5.0, window=20, heads=8, kv_heads=2, head_dim=36),
    Case(causal=False),
    Case(causal=False, query_tile=7, heads=5, kv_heads=5),
]
STORED = [replace(c, kv=kv) for c in CASES for kv in ("f32", "bf16")]


@isas
@pytest.mark.parametrize("case", STORED, ids=repr)
def test_equals_plain_attention(isa, case):
    data = sequence(case, 83)
    found = run_chunks(isa, case, data, [83])
    np.testing.assert_allclose(found, plain(case, *data), rtol=2e-5, atol=4e-6)


@isas
@pytest.mark.parametrize("case", [c for c in STORED if c.causal], ids=repr)
def test_bits_do_not_depend_on_chunks(isa, case):
    data = sequence(case, 83)
    whole = run_chunks(isa, case, data, [83])
    for chunks in ([1] * 83, [40, 43], [16, 1, 31, 35], [82, 1]):
        np.testing.assert_array_equal(run_chunks(isa, case, data, chunks), whole)
    for query_tile in (1, 3, 64):
        np.testing.assert_array_equal(run_chunks(isa, replace(case, query_tile=query_tile), data, [83]), whole)


@isas
@pytest.mark.parametrize("kv", ["f32", "bf16"])
@pytest.mark.parametrize("window", [0, 9])
def test_bits_do_not_depend_on_company(isa, kv, window):
    case = Case(heads=6, kv_heads=2, head_dim=20, kv=kv, window=window)
    lengths = [1, 45, 16, 33]
    data = [sequence(case, n, seed=n) for n in lengths]
    alone = [run_chunks(isa, case, d, [len(d[0])]) for d in data]
    cache = Cache(case, len(data), 64)
    together = step(isa, case, cache, [(s, 0, *d) for s, d in enumerate(data)])
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found, expected)
    # Another step that mixes a continued prompt with decoding, sequences in another order.
    more = [sequence(case, n, seed=90 + n) for n in (5, 1, 30)]
    mixed = step(isa, case, cache, [(s, lengths[s], *m) for s, m in zip((3, 1, 2), more, strict=True)])
    for s, extra, found in zip((3, 1, 2), more, mixed, strict=True):
        joined = tuple(np.concatenate([a, b]) for a, b in zip(data[s], extra, strict=True))
        np.testing.assert_array_equal(found, run_chunks(isa, case, joined, [len(joined[0])])[lengths[s] :])


@isas
@pytest.mark.parametrize("kv", ["f32", "bf16"])
def test_what_comes_later_never_leaks(isa, kv):
    """NaN or infinity in later tokens of the same tile, or in slots outside the window, leaves earlier bits alone."""
    for case in (Case(kv=kv, head_dim=20), Case(kv=kv, heads=1, kv_heads=1, window=5)):
        data = sequence(case, 60)
        clean = run_chunks(isa, case, data, [60])
        for bad in (np.nan, np.inf):
            q, k, v = (x.copy() for x in data)
            k[50:], v[50:] = bad, bad
            np.testing.assert_array_equal(run_chunks(isa, case, (q, k, v), [60])[:50], clean[:50])
            assert np.isnan(run_chunks(isa, case, (q, k, v), [60])[50]).all()
            if case.window:
                q, k, v = (x.copy() for x in data)
                k[:10], v[:10] = bad, bad
                np.testing.assert_array_equal(run_chunks(isa, case, (q, k, v), [60])[15:], clean[15:])


@isas
def test_cache_rounds_to_nearest_even(isa):
    case = Case(kv="bf16", heads=2, kv_heads=2, head_dim=24)
    q, k, v = sequence(case, 20)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xBF80FFFF, 0x00010000], np.uint32).view(
        np.float32
    )
    k[0, 0, : len(ties)] = ties
    v[3, 1, : len(ties)] = ties
    cache = Cache(case, 1, 20)
    step(isa, case, cache, [(0, 0, q, k, v)])
    for position in range(20):
        block, slot = cache.tables[0, position // 16], position % 16
        np.testing.assert_array_equal(cache.keys[block, :, :, slot], to_bf16(k[position]))
        np.testing.assert_array_equal(cache.values[block, :, slot], to_bf16(v[position]))
    nan = np.full_like(v, np.nan)
    step(isa, case, cache, [(0, 0, q, k, nan)])
    assert np.isnan(from_bf16(cache.values[cache.tables[0, 0], 0, 0])).all()


@isas
def test_large_scores_do_not_overflow(isa):
    case = Case(heads=2, kv_heads=2)
    q, k, v = sequence(case, 40)
    found = run_chunks(isa, case, (q * 1e4, k * 1e4, v), [40])
    np.testing.assert_allclose(found, plain(case, q * np.float32(1e4), k * np.float32(1e4), v), rtol=1e-4, atol=1e-5)
