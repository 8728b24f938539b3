"""The same bits, whatever the company, the cut of the prompt, the threads and the cache's past.

Each check also runs under a fault, which splits the sums of norms and matmuls as all of these say, and must fail.
"""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from programs import limits, pack, sampling
from support import random_arrays, tiny_graph

from hasten import _native, formats
from hasten.backends import native
from hasten.backends.batch import Batch
from hasten.graph.ops import Attention

BLOCKS, BLOCK_SIZE, NEW = 48, 16, 6


@cache
def graph():
    """Odd widths, grouped heads, a window and a soft cap in the second block."""
    made = tiny_graph(hidden=72, heads=6, kv_heads=2, head_dim=20, feed_forward=150, vocabulary=211, head_norms=True)
    nodes = [
        replace(n, op=replace(n.op, window=19, softcap=8.0)) if isinstance(n.op, Attention) and n.op.layer == 1 else n
        for n in made.nodes
    ]
    return replace(made, nodes=tuple(nodes), context=256)


@cache
def weights(format_name):
    return pack(graph(), random_arrays(graph()), format_name)


def compile(format_name, isa, kv_format="bf16", threads=1):
    sizes = limits(
        context=160,
        max_tokens=200,
        max_rows=200,
        max_sequences=8,
        kv_blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        kv_format=kv_format,
        threads=threads,
    )
    return native.compile(graph(), weights(format_name), sizes, isa=isa)


@dataclass
class Sequence:
    """A prompt that is fed `chunk` tokens a step from step `arrival` on, then NEW tokens greedily."""

    prompt: np.ndarray
    table: np.ndarray
    chunk: int = 10**6
    arrival: int = 0
    all_rows: bool = True
    ids: list[int] = field(default_factory=list)
    done: int = 0
    seen: dict[int, bytes] = field(default_factory=dict)  # position -> bits of its logits, log-probabilities and draw

    def __post_init__(self):
        self.ids = list(self.prompt)

    @property
    def finished(self):
        return self.done == len(self.prompt) + NEW


def prompt(length, seed):
    return np.random.default_rng(seed).integers(0, graph().vocabulary, length)


def serve(program, sequences):
    """Run all to their ends, in one step whatever there is to do."""
    step = 0
    while not all(s.finished for s in sequences):
        active = [s for s in sequences if s.arrival <= step and not s.finished]
        if active:
            advance(program, active)
        step += 1
    return sequences


def advance(program, active):
    spans = [s.ids[s.done : s.done + s.chunk] for s in active]
    starts = np.cumsum([0] + [len(span) for span in spans]).astype(np.int32)
    positions = np.concatenate([np.arange(s.done, s.done + len(span)) for s, span in zip(active, spans, strict=True)])
    wanted = [
        range(first, last) if s.all_rows else [last - 1]
        for s, first, last in zip(active, starts[:-1], starts[1:], strict=True)
    ]
    rows = np.array([row for some in wanted for row in some], np.int32)
    out = program.step(
        Batch(
            np.array([token for span in spans for token in span], np.int32),
            positions.astype(np.int32),
            starts,
            np.stack([s.table for s in active]).astype(np.int32),
            rows,
        )
    )
    how = sampling(len(rows), temperature=0.9, top_k=30, top_p=0.95, seed=5, logprobs=2)
    how.position[:] = positions[rows]
    drawn, likeliest, logits = out.sample(how), out.argmax(), out.logits()
    likelihood = out.score(likeliest)
    at = 0
    for s, span, some in zip(active, spans, wanted, strict=True):
        for row in some:
            parts = (logits[at], likelihood[at], drawn.tokens[at], drawn.logprobs[at], drawn.top_logprobs[at])
            s.seen[int(positions[row])] = b"".join(p.tobytes() for p in parts)
            at += 1
        s.done += len(span)
        if s.done == len(s.ids):
            s.ids.append(int(likeliest[at - 1]))


def ordered(index=0, count=160 // BLOCK_SIZE):
    return np.arange(index * count, (index + 1) * count)


LENGTH = 75


def alone(format_name, isa, kv_format):
    (found,) = serve(compile(format_name, isa, kv_format), [Sequence(prompt(LENGTH, 0), ordered())])
    return found


def company(program):
    """Among others that come and go, prefill beside decode, last rows only."""
    others = [Sequence(prompt(n, n), ordered(i), arrival=a) for i, (n, a) in enumerate([(3, 0), (41, 1)])]
    mine = Sequence(prompt(LENGTH, 0), ordered(2), arrival=1)
    last = Sequence(prompt(17, 9), ordered(3), chunk=4, arrival=2, all_rows=False)
    serve(program, [*others, mine, last])
    yield mine
    again = Sequence(prompt(LENGTH, 0), ordered(3), all_rows=False)
    serve(program, [again, Sequence(prompt(60, 8), ordered(1))])
    yield again


def chunks(program):
    for chunk in (33, 1):
        yield serve(program, [Sequence(prompt(LENGTH, 0), ordered(), chunk=chunk)])[0]


def same_step(program):
    yield serve(program, [Sequence(prompt(LENGTH, 0), ordered())])[0]


def cache_state(program):
    """Blocks in any order, full of what others left there."""
    table = np.random.default_rng(1).permutation(BLOCKS)
    serve(program, [Sequence(prompt(90, 90 + i), table[10 * i : 10 * i + 10]) for i in range(2)])
    yield serve(program, [Sequence(prompt(LENGTH, 0), table[5:15])])[0]


def everything(program):
    for run in (company, chunks, cache_state):
        yield from run(program)


# name -> (what is run, with how many threads)
CHECKS = {
    "company": (company, (1,)),
    "chunks": (chunks, (1,)),
    "threads": (same_step, (2, 5)),
    "cache": (cache_state, (1,)),
    "all at once": (everything, (3,)),
}


def check(name, format_name, isa, kv_format="bf16"):
    """Raises AssertionError where any position's bits differ from those of the sequence alone, whole, on one thread."""
    expected = alone(format_name, isa, kv_format)
    run, teams = CHECKS[name]
    for threads in teams:
        for found in run(compile(format_name, isa, kv_format, threads)):
            assert found.ids == expected.ids
            assert found.seen.items() <= expected.seen.items()
            assert len(found.seen) >= NEW


# Each alone for one format of a kind, all at once for every format; every instruction set.
SOME = ("f32", "bf16", "int8-g32", "int4-g64", "codebook4-g128")
CASES = [(name, format_name) for name in CHECKS for format_name in SOME if name != "all at once"]
CASES += [("all at once", format_name) for format_name in formats.names()]
every_case = pytest.mark.parametrize(("name", "format_name"), CASES)
every_isa = pytest.mark.parametrize("isa", _native.matmul.isas())


@pytest.fixture
def thread_sum():
    _native.set_fault("thread_sum")
    yield
    _native.set_fault("")


@every_isa
@every_case
def test_bits_are_the_same(name, format_name, isa):
    check(name, format_name, isa)


@every_isa
@every_case
def test_the_check_sees_a_sum_that_depends_on_threads(name, format_name, isa, thread_sum):
    with pytest.raises(AssertionError):
        check(name, format_name, isa)


@every_isa
@pytest.mark.parametrize("kv_format", ["f32", "int8", ("int4", "bf16"), ("bf16", "int4")])
def test_bits_are_the_same_with_other_caches(isa, kv_format):
    check("all at once", "int4-g64", isa, kv_format)


@every_isa
@pytest.mark.parametrize("kv_format", ["f32", "int8", ("int4", "bf16"), ("bf16", "int4")])
def test_the_check_sees_it_with_other_caches(isa, kv_format, thread_sum):
    with pytest.raises(AssertionError):
        check("all at once", "int4-g64", isa, kv_format)


# Long enough that threads share out one sequence's keys: spans of 512 tokens, the second layer's window crosses one.
DEEP, DEEP_NEW = 1150, 3


@cache
def deep():
    made = replace(graph(), context=DEEP + DEEP_NEW)
    return replace(
        made,
        nodes=tuple(
            replace(n, op=replace(n.op, window=600)) if isinstance(n.op, Attention) and n.op.window else n
            for n in made.nodes
        ),
    )


def decode_deep(kv_format, isa, threads, chunk, company=False):
    """A long prompt in chunks and some steps of decoding -> (tokens, bytes of each step's logits)."""
    tokens = np.random.default_rng(3).integers(0, graph().vocabulary, DEEP).tolist()
    blocks = -(-(DEEP + DEEP_NEW) // BLOCK_SIZE)
    sizes = limits(
        context=DEEP + DEEP_NEW, max_tokens=DEEP + 8, max_rows=2, max_sequences=2, kv_blocks=2 * blocks,
        block_size=BLOCK_SIZE, kv_format=kv_format, threads=threads,
    )  # fmt: skip
    program = native.compile(deep(), weights("int8-g32"), sizes, isa=isa)
    tables = np.arange(2 * blocks, dtype=np.int32).reshape(2, -1)[::-1].copy()
    spans = [(s, tokens[s : min(s + chunk, DEEP)]) for s in range(0, DEEP, chunk)]
    seen, beside = [], 0
    while len(seen) < DEEP_NEW:
        start, part = spans.pop(0)
        other = [7, 8, 9] if company else []
        out = program.step(
            Batch(
                np.array([*part, *other], np.int32),
                np.array([*range(start, start + len(part)), *range(beside, beside + len(other))], np.int32),
                np.array([0, len(part), len(part) + len(other)][: 2 + company], np.int32),
                tables[: 1 + company],
                np.array([len(part) - 1], np.int32),
            )
        )
        beside += len(other)
        if not spans:
            seen.append(out.logits().tobytes())
            spans.append((start + len(part), [int(out.argmax()[0])]))
    return seen


DEEP_RUNS = [(1, 400, False), (2, DEEP, False), (3, 1024, True), (4, 399, True)]


def check_deep(kv_format, isa):
    expected = decode_deep(kv_format, isa, 1, DEEP)
    for run in DEEP_RUNS:
        assert decode_deep(kv_format, isa, *run) == expected


@every_isa
@pytest.mark.parametrize("kv_format", ["f32", "bf16", "int8", "int4"])
def test_long_contexts_are_the_same_on_any_number_of_threads(isa, kv_format):
    check_deep(kv_format, isa)


@every_isa
def test_the_check_sees_it_in_long_contexts(isa, thread_sum):
    with pytest.raises(AssertionError):
        check_deep("bf16", isa)


def test_only_threads_keep_partial_results():
    def buffers(threads, context):
        sizes = limits(context=context, kv_blocks=80, threads=threads, max_tokens=8, max_rows=8)
        return native.compile(replace(graph(), context=context), weights("f32"), sizes).memory()["buffers"]

    per_thread = buffers(2, 512) - buffers(1, 512)  # 512 tokens are one span
    assert buffers(2, 1024) - buffers(1, 1024) > per_thread


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="unknown fault"):
        _native.set_fault("nonsense")
