"""The same request gives the same tokens and log-probabilities, bit for bit, whatever the engine does around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import small_model
from support import tiny_graph

from hasten import _native, checkpoint
from hasten.backends import native
from hasten.backends.batch import Limits
from hasten.checkpoint import random_weights
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams, Sequence, StructuredOutputsParams

GRAPH = tiny_graph(hidden=128, feed_forward=192, heads=8, kv_heads=2, head_dim=16)
LIMITS = Limits(context=64, max_tokens=48, max_sequences=8, max_rows=8, block_size=16, kv_blocks=32, threads=1)
FORMATS = ("f32", "bf16", "int8-g32", "int4-g32", "codebook4-g32")
CASES = [
    *((format, "bf16") for format in FORMATS),
    *((format, kv_format) for format in ("bf16", "int4-g32") for kv_format in ("int8", "int4", "f32")),
]
"""Formats of the weights, and of the cache."""

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


def engine(format: str, kv_format: str = "bf16", **limits: int) -> Engine:
    weights = random_weights(GRAPH, format)
    return Engine(native.compile(GRAPH, weights, replace(LIMITS, kv_format=kv_format, **limits)), GRAPH.vocabulary)


def result(sequence: Sequence) -> Result:
    assert sequence.finish_reason == "length"
    return sequence.output.tolist(), sequence.logprobs, sequence.top


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()
    assert engine.blocks.free == engine.blocks.count


def together(engine: Engine, wanted: list[Request]) -> list[Result]:
    started = [engine.add(r.prompt, r.params)[0] for r in wanted]
    finish(engine)
    return [result(s) for s in started]


def alone(format: str, kv_format: str = "bf16") -> list[Result]:
    return [together(engine(format, kv_format), [r])[0] for r in requests()]


@dataclass(frozen=True)
class Case:
    """Formats, and what each request gives when it is alone in a fresh engine on one thread."""

    format: str
    kv_format: str
    expected: list[Result]

    def engine(self, **limits: int) -> Engine:
        return engine(self.format, self.kv_format, **limits)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param, alone(*request.param))


def test_outputs_are_worth_comparing(case: Case) -> None:
    tokens = [t for t, _, _ in case.expected]
    assert all(len(t) == 14 for t in tokens)
    assert len({tuple(t) for t in tokens}) == len(tokens)


def test_in_company(case: Case) -> None:
    assert together(case.engine(), requests()) == case.expected


@pytest.mark.parametrize("max_tokens", [8, 11, 25])
def test_prompts_in_chunks(case: Case, max_tokens: int) -> None:
    assert together(case.engine(max_tokens=max_tokens), requests()) == case.expected


def test_prefixes_found_in_the_cache(case: Case) -> None:
    warm = case.engine()
    together(warm, requests())
    for request, wanted in zip(requests(), case.expected, strict=True):
        (sequence,) = warm.add(request.prompt, request.params)
        finish(warm)
        assert sequence.cached == (len(request.prompt) - 1) // 16 * 16
        assert result(sequence) == wanted


def test_after_preemption(case: Case) -> None:
    tight = case.engine(kv_blocks=5)
    started = [tight.add(r.prompt, r.params)[0] for r in requests()]
    finish(tight)
    assert sum(s.preemptions for s in started) >= 1
    assert [result(s) for s in started] == case.expected


def test_on_more_threads(case: Case) -> None:
    assert together(case.engine(threads=3), requests()) == case.expected


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 11}, {"kv_blocks": 9}, {"threads": 3}], ids=str)
def test_in_mixed_company(case: Case, limits: dict[str, int]) -> None:
    """Beside several choices each, under other salts, of higher and lower priority, whose prompts are scored."""
    busy = case.engine(**limits)
    for number, r in enumerate(requests()):
        how = replace(r.params, n=3, seed=9)
        busy.add(r.prompt, how, prompt_logprobs=2 * (number % 2) or None, priority=number % 3 - 1, cache_salt="x")
    started = [busy.add(r.prompt, r.params)[0] for r in requests()]
    several = busy.add(requests()[1].prompt, replace(requests()[1].params, n=2), priority=1)
    finish(busy)
    assert [result(s) for s in started] == case.expected
    assert result(several[0]) == case.expected[1] != result(several[1])


def test_scored_prompts(case: Case) -> None:
    """Scores and what follows are the same alone and in a tight engine, and what follows is as without scores."""

    def scored(engine: Engine, r: Request) -> Sequence:
        return engine.add(r.prompt, r.params, prompt_logprobs=2)[0]

    def all_of(sequence: Sequence) -> tuple[Result, list[float], list[list[tuple[int, float]]]]:
        assert sequence.scores
        return result(sequence), sequence.scores.logprobs, sequence.scores.likeliest

    expected = []
    for r in requests():
        quiet = case.engine()
        one = scored(quiet, r)
        finish(quiet)
        expected.append(all_of(one))
    assert [tokens for tokens, _, _ in expected] == case.expected
    tight = case.engine(kv_blocks=6, max_tokens=11)
    started = [scored(tight, r) for r in requests()]
    finish(tight)
    assert [all_of(s) for s in started] == expected


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4", "f32"])
def test_structured_outputs(tmp_path: Path, kv_format: str) -> None:
    """Alone, and in chunks, preempted, on more threads or from the cache, among plain ones and other choices."""
    pytest.importorskip("llguidance")
    model = checkpoint.open(str(small_model.write(tmp_path / "small")))
    weights, limits = model.weights(), replace(LIMITS, kv_format=kv_format)

    def made(**changed: int) -> Engine:
        program = native.compile(model.graph, weights, replace(limits, **changed))
        return Engine(program, model.graph.vocabulary, model.tokenizer, model.eos_token_ids)

    regexes = ("[a-f]{20}", "(foo|barbaz)+!", "[0-9]{4}-[a-z ]{9}")
    wanted = [
        Request(
            model.tokenizer.encode(text),
            SamplingParams(
                max_tokens=20, seed=i, logprobs=3, structured_outputs=StructuredOutputsParams(regex=regexes[i % 3])
            ),
        )
        for i, text in enumerate(["abc", "a text that is a little longer", "b" * 33 + "c", "b" * 33 + "d"])
    ]

    def written(sequence: Sequence) -> tuple[list[int], list[float], list[list[tuple[int, float]]], str]:
        assert sequence.finish_reason in ("stop", "length")
        return sequence.output.tolist(), sequence.logprobs, sequence.top, sequence.text

    expected = []
    for r in wanted:
        quiet = made()
        (one,) = quiet.add(r.prompt, r.params)
        finish(quiet)
        expected.append(written(one))
    warm = made()
    for busy in (warm, warm, made(max_tokens=11), made(kv_blocks=6), made(threads=3)):
        started = []
        for r in wanted:
            busy.add(r.prompt, replace(r.params, n=3, seed=9), priority=-1, cache_salt="x")
            busy.add(r.prompt, replace(r.params, structured_outputs=None), prompt_logprobs=2)
            started += busy.add(r.prompt, r.params)
        finish(busy)
        assert [written(s) for s in started] == expected


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
