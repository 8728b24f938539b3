"""The same request gives the same tokens and log-probabilities, bit for bit, whatever the engine does around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import tiny_graph

from hasten import _native
from hasten.backends import native
from hasten.backends.batch import Limits
from hasten.checkpoint import random_weights
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams, Sequence

GRAPH = tiny_graph(hidden=128, feed_forward=192, heads=8, kv_heads=2, head_dim=16)
LIMITS = Limits(context=64, max_tokens=48, max_sequences=8, max_rows=8, block_size=16, kv_blocks=32, threads=1)
FORMATS = ("f32", "bf16", "int8-g32", "int4-g32", "codebook4-g32")

Result = tuple[list[int], list[float], list[list[tuple[int, float]]]]


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    params: SamplingParams


def requests() -> list[Request]:
    """Greedy, plain, filtered, penalised and constrained ones; some share a prefix of two blocks."""
    random = np.random.default_rng(5)
    shared = random.integers(0, GRAPH.vocabulary, 33).tolist()
    prompts = [random.integers(0, GRAPH.vocabulary, n).tolist() for n in (1, 17, 40, 5, 9)]
    common = SamplingParams(max_tokens=14, seed=3, logprobs=3)
    how = [
        replace(common, temperature=0),
        common,
        replace(common, temperature=0.7, top_k=20, top_p=0.9),
        replace(common, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        replace(
            common, typical_p=0.8, logit_bias={3: 2.0, 7: -100.0}, allowed_token_ids=list(range(2, 40)), min_tokens=9
        ),
    ]
    own = [Request(p, h) for p, h in zip(prompts, how, strict=True)]
    return [*own, *(Request([*shared, i], h) for i, h in enumerate(how[:2]))]


def engine(format: str, **limits: int) -> Engine:
    weights = random_weights(GRAPH, format)
    return Engine(native.compile(GRAPH, weights, replace(LIMITS, **limits)), GRAPH.vocabulary)


def result(sequence: Sequence) -> Result:
    assert sequence.finish_reason == "length"
    return sequence.output.tolist(), sequence.logprobs, sequence.top


def together(engine: Engine, wanted: list[Request]) -> list[Result]:
    started = [engine.add(r.prompt, r.params)[0] for r in wanted]
    while engine.busy:
        engine.step()
    assert engine.blocks.free == engine.blocks.count
    return [result(s) for s in started]


def alone(format: str, **limits: int) -> list[Result]:
    return [together(engine(format, **limits), [r])[0] for r in requests()]


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest) -> tuple[str, list[Result]]:
    """A format, and what each request gives when it is alone in a fresh engine on one thread."""
    return request.param, alone(request.param)


Case = tuple[str, list[Result]]


def test_outputs_are_worth_comparing(case: Case) -> None:
    tokens = [t for t, _, _ in case[1]]
    assert all(len(t) == 14 for t in tokens)
    assert len({tuple(t) for t in tokens}) == len(tokens)


def test_in_company(case: Case) -> None:
    format, expected = case
    assert together(engine(format), requests()) == expected


@pytest.mark.parametrize("max_tokens", [8, 11, 25])
def test_prompts_in_chunks(case: Case, max_tokens: int) -> None:
    format, expected = case
    assert together(engine(format, max_tokens=max_tokens), requests()) == expected


def test_prefixes_found_in_the_cache(case: Case) -> None:
    format, expected = case
    warm = engine(format)
    together(warm, requests())
    for request, wanted in zip(requests(), expected, strict=True):
        (sequence,) = warm.add(request.prompt, request.params)
        while warm.busy:
            warm.step()
        assert sequence.cached == (len(request.prompt) - 1) // 16 * 16
        assert result(sequence) == wanted


def test_after_preemption(case: Case) -> None:
    format, expected = case
    tight = engine(format, kv_blocks=5)
    started = [tight.add(r.prompt, r.params)[0] for r in requests()]
    while tight.busy:
        tight.step()
    assert sum(s.preemptions for s in started) >= 1
    assert [result(s) for s in started] == expected


def test_on_more_threads(case: Case) -> None:
    format, expected = case
    assert together(engine(format, threads=3), requests()) == expected


@contextmanager
def fault(name: str) -> Iterator[None]:
    _native.set_fault(name)
    try:
        yield
    finally:
        _native.set_fault("")


@pytest.mark.parametrize("format", FORMATS)
def test_these_tests_would_notice(format: str) -> None:
    """With sums that depend on threads and on company, each comparison above fails."""
    with fault("thread_sum"):
        expected = alone(format)
        assert together(engine(format), requests()) != expected
        assert together(engine(format, max_tokens=8), requests()) != expected
        assert together(engine(format, kv_blocks=5), requests()) != expected
        assert together(engine(format, threads=3), requests()) != expected
        warm = engine(format)
        together(warm, requests())
        assert [together(warm, [r])[0] for r in requests()] != expected
