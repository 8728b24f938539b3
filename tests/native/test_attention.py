"""Paged attention of every instruction set against a plain float64 softmax, and its exactness bit by bit."""

from __future__ import annotations

import signal
import subprocess
import sys
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
    in_spans: bool = False

    @property
    def head_bytes(self) -> int:
        """Of one head's keys, or values, in a block: codes, then each token's bfloat16 scale, then int4's centres."""
        of_token = {
            "f32": 4 * self.head_dim,
            "bf16": 2 * self.head_dim,
            "int8": self.head_dim + 2,
            "int4": self.half + 4,
        }
        return of_token[self.kv] * self.block_size

    @property
    def half(self) -> int:
        return (self.head_dim + 1) // 2

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
        self.keys = np.full((blocks, case.kv_heads, case.head_bytes), 0xFF, np.uint8)  # NaN in floats and scales
        self.values = self.keys.copy()


def hadamard(head_dim: int):
    """Orthonormal, of the largest power of two that divides head_dim, on the diagonal."""
    size = head_dim & -head_dim
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.kron(np.eye(head_dim // size), np.array(signs) / size**0.5)


def decoded(case: Case, head: np.ndarray, shape: tuple[int, int], scale_axis: int):
    """The numbers of one head in a block, [shape], in float64; `scale_axis` is that of the tokens."""
    if case.kv == "int4":
        return unpacked(case, head, scale_axis)
    if case.kv == "f32":
        return head.view(np.float32).reshape(shape).astype(np.float64)
    if case.kv == "bf16":
        return from_bf16(head.view(np.uint16)).reshape(shape).astype(np.float64)
    codes = head[: shape[0] * shape[1]].view(np.int8).reshape(shape).astype(np.float64)
    scales = from_bf16(head[shape[0] * shape[1] :].view(np.uint16)).astype(np.float64)
    return codes * np.expand_dims(scales, 1 - scale_axis)


def unpacked(case: Case, head: np.ndarray, scale_axis: int):
    """As `decoded`, of 4-bit codes: (2 code - 15) scale + centre; low nibbles hold the first half of the features."""
    size, half = case.block_size, case.half
    bytes = head[: half * size].reshape((half, size) if scale_axis else (size, half))
    codes = np.concatenate([bytes & 15, bytes >> 4], axis=1 - scale_axis).astype(np.float64)
    codes = codes[: case.head_dim] if scale_axis else codes[:, : case.head_dim]
    scales, centres = from_bf16(head[half * size :].view(np.uint16)).astype(np.float64).reshape(2, size)
    values = (2 * codes - 15) * np.expand_dims(scales, 1 - scale_axis) + np.expand_dims(centres, 1 - scale_axis)
    return hadamard(case.head_dim) @ values if scale_axis else values  # keys are kept turned


def held(case: Case, cache: Cache, length: int, sequence: int = 0):
    """(keys, values) [length, kv_heads, head_dim] of a sequence, in float64, as the cache holds them."""
    size, found = case.block_size, ([], [])
    for block in cache.tables[sequence, : -(-length // size)]:
        heads = range(case.kv_heads)
        found[0].append([decoded(case, cache.keys[block, h], (case.head_dim, size), 1).T for h in heads])
        found[1].append([decoded(case, cache.values[block, h], (size, case.head_dim), 0) for h in heads])
    return tuple(np.concatenate(np.array(x).transpose(0, 2, 1, 3))[:length] for x in found)


def step(isa, case: Case, cache: Cache, parts):
    """One step. parts: (sequence, first position, q, k, v) -> the outputs of each part."""
    q, k, v = (np.ascontiguousarray(np.concatenate([p[i] for p in parts])) for i in (2, 3, 4))
    positions = np.concatenate([np.arange(p[1], p[1] + len(p[2])) for p in parts]).astype(np.int32)
    starts = np.cumsum([0, *(len(p[2]) for p in parts)]).astype(np.int32)
    tables = np.ascontiguousarray(cache.tables[[p[0] for p in parts]])
    out = _native.ops_attention(
        isa, case.kv, case.block_size, q, k, v, cache.keys, cache.values, positions, starts, tables,
        case.scale, case.softcap, case.window, case.causal, case.query_tile, case.in_spans,
    )  # fmt: skip
    return np.split(np.asarray(out), starts[1:-1])


def sequence(case: Case, length: int, seed: int = 1):
    rng = np.random.default_rng(seed)
    sizes = (case.heads, case.kv_heads, case.kv_heads)
    return tuple(rng.standard_normal((length, n, case.head_dim)).astype(np.float32) for n in sizes)


def plain(case: Case, q, k, v):
    """softmax(mask(cap(scale q k^T))) v in float64."""
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


def run_chunks(isa, case: Case, data, chunks, cache=None):
    """The sequence fed in chunks of these lengths into an empty cache -> its output."""
    cache = cache or Cache(case, 1, sum(chunks))
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
    Case(block_size=128, heads=14, kv_heads=2),
    Case(heads=3, kv_heads=1, head_dim=27),
    Case(heads=2, kv_heads=2, head_dim=96),
]
KINDS = ("f32", "bf16", "int8", "int4")
kinds = pytest.mark.parametrize("kv", KINDS)
STORED = [replace(c, kv=kv) for c in CASES for kv in KINDS]


@isas
@pytest.mark.parametrize("case", STORED, ids=repr)
def test_equals_plain_attention(isa, case):
    data = sequence(case, 83)
    cache = Cache(case, 1, 83)
    found = run_chunks(isa, case, data, [83], cache)
    keys, values = held(case, cache, 83)
    np.testing.assert_allclose(found, plain(case, data[0], keys, values), rtol=2e-5, atol=4e-6)
    if case.kv == "bf16":
        np.testing.assert_array_equal(keys, from_bf16(to_bf16(data[1])))
        np.testing.assert_array_equal(values, from_bf16(to_bf16(data[2])))


@isas
@pytest.mark.parametrize("case", [c for c in STORED if c.kv == "int8"], ids=repr)
def test_int8_is_the_nearest_code_of_a_scale_that_just_reaches(isa, case):
    data = sequence(case, 83)
    cache = Cache(case, 1, 83)
    run_chunks(isa, case, data, [83], cache)
    for given, found in zip(data[1:], held(case, cache, 83), strict=True):
        most = np.abs(given).max(-1, keepdims=True).astype(np.float64)
        assert (np.abs(found - given) <= most / 127 * (1 + 2**-7) * 0.5 * (1 + 1e-5)).all()
    # Nothing but the tokens' own codes and scales was written: all the rest is as it was made.
    fresh, written = Cache(case, 1, 83), 83 * case.kv_heads * (case.head_dim + 2)
    for before, after in ((fresh.keys, cache.keys), (fresh.values, cache.values)):
        assert (before != after).sum() <= written
        unused = [b for b in range(len(before)) if b not in cache.tables]
        np.testing.assert_array_equal(after[unused], before[unused])


@isas
@pytest.mark.parametrize("case", [c for c in STORED if c.kv == "int4"], ids=repr)
def test_int4_is_the_nearest_code_of_a_scale_that_just_reaches(isa, case):
    data = sequence(case, 83)
    data[1][..., 0] *= 9  # a feature as large as real models' keys have
    data[2][:] += 2  # and values far from zero
    cache = Cache(case, 1, 83)
    run_chunks(isa, case, data, [83], cache)
    turn = hadamard(case.head_dim)
    keys, values = held(case, cache, 83)
    for given, found in ((data[1].astype(np.float64) @ turn, keys @ turn), (data[2].astype(np.float64), values)):
        low, high = given.min(-1, keepdims=True), given.max(-1, keepdims=True)
        centre = from_bf16(to_bf16((low + high) / 2)).astype(np.float64)
        reach = np.maximum(high - centre, centre - low)
        # Half a step of sixteen levels; another bfloat16 is the centre where float32's sum is rounded the other way.
        assert (np.abs(found - given) <= (reach + np.abs(centre) * 2**-8) / 15 * (1 + 2**-7) * (1 + 1e-5)).all()
    fresh, written = Cache(case, 1, 83), 83 * case.kv_heads * (case.half + 4)
    for before, after in ((fresh.keys, cache.keys), (fresh.values, cache.values)):
        assert (before != after).sum() <= written
        unused = [b for b in range(len(before)) if b not in cache.tables]
        np.testing.assert_array_equal(after[unused], before[unused])


@isas
def test_turned_keys_share_what_is_large(isa):
    """One feature of every key is 30 times the others': an int4 cache loses little more than without it."""

    def error(factor):
        case = Case(kv="int4", head_dim=64, heads=1, kv_heads=1)
        q, k, v = sequence(case, 60)
        k[..., 5] *= factor
        cache = Cache(case, 1, 60)
        run_chunks(isa, case, (q, k, v), [60], cache)
        others = np.arange(64) != 5
        return np.abs(held(case, cache, 60)[0] - k)[..., others].mean()

    assert error(30) < 2.5 * error(1)  # 30 without turning: the scale is the largest feature's


# Spans of keys are 512 tokens or a block, 480 where blocks have 48; tiles 64.
LONG = [
    Case(heads=7, kv_heads=1, block_size=32, query_tile=32),
    Case(heads=2, kv_heads=1, block_size=48, query_tile=9),
    Case(heads=9, kv_heads=1, head_dim=20, softcap=3.0),
    Case(heads=4, kv_heads=2, block_size=32, window=530, query_tile=8),
    Case(heads=2, kv_heads=2, window=40, query_tile=64),
    Case(heads=3, kv_heads=1, block_size=1024, query_tile=5),
]


@isas
@pytest.mark.parametrize("case", [replace(c, kv=kv) for c in LONG for kv in KINDS], ids=repr)
def test_long_contexts(isa, case):
    """Against the formula; the same bits however cut into chunks, tiles of queries and spans of keys."""
    length = 1111
    data, cache = sequence(case, length), Cache(case, 1, length)
    whole = run_chunks(isa, case, data, [length], cache)
    keys, values = held(case, cache, length)
    np.testing.assert_allclose(whole, plain(case, data[0], keys, values), rtol=2e-5, atol=4e-6)
    ones = [1, 1, 1, 1]
    for chunks in ([480, 33, *ones, length - 517], [1023, *ones, 80, *ones], [511, *ones, 500, 92, *ones]):
        for how in (case, replace(case, in_spans=True, query_tile=3)):
            np.testing.assert_array_equal(run_chunks(isa, how, data, chunks), whole)


SKIPPING = """
import numpy as np
from hasten import _native
isa, kv, window, in_spans = {isa!r}, {kv!r}, {window}, {in_spans}
length, size, dim = 700, 16, 16
blocks = -(-length // size)
bytes = {{"f32": 4 * dim, "bf16": 2 * dim, "int8": dim + 2, "int4": dim // 2 + 4}}[kv] * size
keys = np.zeros((blocks, 1, bytes), np.uint8)
values = keys.copy()
table = np.arange(blocks, dtype=np.int32)[None]
table[0, : (length - 3 - 40) // size] = 2**31 - 1  # far outside of the cache: reading there ends the process
q, kv_rows = np.ones((2, 3, dim), np.float32), np.ones((2, 1, dim), np.float32)
positions, starts = np.array([length - 2, length - 1], np.int32), np.array([0, 2], np.int32)
out = _native.ops_attention(isa, kv, size, q, kv_rows, kv_rows, keys, values, positions, starts, table, 1.0,
                            window=window, query_tile=2, in_spans=in_spans)
assert np.isfinite(np.asarray(out)).all()
"""


@isas
@kinds
def test_blocks_outside_the_window_are_not_read(isa, kv):
    def status(window, in_spans):
        code = SKIPPING.format(isa=isa, kv=kv, window=window, in_spans=in_spans)
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode

    assert status(40, False) == 0
    assert status(40, True) == 0
    assert status(0, False) == -signal.SIGSEGV  # so the blocks that the window skipped could not have been read


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
@kinds
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
@kinds
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
        keys = cache.keys[block].view(np.uint16).reshape(2, 24, 16)
        values = cache.values[block].view(np.uint16).reshape(2, 16, 24)
        np.testing.assert_array_equal(keys[:, :, slot], to_bf16(k[position]))
        np.testing.assert_array_equal(values[:, slot], to_bf16(v[position]))
    nan = np.full_like(v, np.nan)
    step(isa, case, cache, [(0, 0, q, k, nan)])
    assert np.isnan(held(case, cache, 20)[1]).all()


@isas
@kinds
def test_zeros_and_tiny_numbers(isa, kv):
    case = Case(kv=kv)
    q, k, v = sequence(case, 20)
    for factor in (0, 1e-40, 1e-30):
        found = run_chunks(isa, case, (q, k * np.float32(factor), v * np.float32(factor)), [20])
        np.testing.assert_allclose(found, 0, atol=5 * factor)
        assert np.isfinite(found).all()


def test_an_unknown_format_is_refused():
    data, cache = sequence(Case(), 3), Cache(Case(), 1, 3)
    with pytest.raises(ValueError, match="unknown kv format 'int3'"):
        _native.ops_attention(
            ISAS[0], "int3", 16, *data, cache.keys, cache.values, np.arange(3, dtype=np.int32),
            np.array([0, 3], np.int32), cache.tables, 1.0,
        )  # fmt: skip


@isas
def test_large_scores_do_not_overflow(isa):
    case = Case(heads=2, kv_heads=2)
    q, k, v = sequence(case, 40)
    found = run_chunks(isa, case, (q * 1e4, k * 1e4, v), [40])
    np.testing.assert_allclose(found, plain(case, q * np.float32(1e4), k * np.float32(1e4), v), rtol=1e-4, atol=1e-5)
