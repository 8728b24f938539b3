"""What the model says of a prompt: the engine's values against the program's own, scored in one piece."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import tiny_graph

from hasten.backends import native
from hasten.backends.batch import Batch, Limits
from hasten.checkpoint import random_weights
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams, Sequence
from hasten.errors import ContextError, InputError

GRAPH = tiny_graph(hidden=64, feed_forward=96, heads=4, kv_heads=2, head_dim=16)
LIMITS = Limits(context=64, max_tokens=48, max_sequences=4, max_rows=48, block_size=16, kv_blocks=16, threads=1)
PROMPT = np.random.default_rng(3).integers(0, GRAPH.vocabulary, 45).tolist()


def engine(**limits: int) -> Engine:
    return Engine(native.compile(GRAPH, random_weights(GRAPH, "int8-g32"), replace(LIMITS, **limits)), GRAPH.vocabulary)


@pytest.fixture(scope="module")
def logprobs() -> np.ndarray:
    """[45, vocabulary] log-probabilities after each token of PROMPT, by float64 softmax of the program's logits."""
    count = len(PROMPT)
    program = engine().program
    whole = np.arange(count, dtype=np.int32)
    table = np.arange(4, dtype=np.int32)[None]
    logits = program.step(
        Batch(np.array(PROMPT, np.int32), whole, np.array([0, count], np.int32), table, whole)
    ).logits()
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(1, keepdims=True))


def run(engine: Engine, *sequences: Sequence) -> None:
    while engine.busy:
        engine.step()
    assert all(s.finish_reason == "length" for s in sequences)
    assert engine.blocks.free == engine.blocks.count


def scored(engine: Engine, top: int = 3, new: int = 4, **how: bool) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=new, logprobs=2)
    (sequence,) = engine.add(PROMPT, params, prompt_logprobs=top, **how)
    return sequence


def test_values_are_the_models(logprobs: np.ndarray) -> None:
    one = engine()
    sequence = scored(one)
    run(one, sequence)
    assert sequence.scores
    expected = logprobs[np.arange(44), PROMPT[1:]]
    np.testing.assert_allclose(sequence.scores.logprobs, expected, atol=2e-6, rtol=0)
    best = np.argsort(-logprobs[:44], axis=1)[:, :3]
    assert [[t for t, _ in row] for row in sequence.scores.likeliest] == best.tolist()


def test_a_tokens_value_is_the_same_float_wherever_it_appears() -> None:
    one = engine()
    sequence = scored(one, top=GRAPH.vocabulary)
    run(one, sequence)
    assert sequence.scores
    for token, value, row in zip(PROMPT[1:], sequence.scores.logprobs, sequence.scores.likeliest, strict=True):
        assert dict(row)[token] == value


@pytest.mark.parametrize(
    "limits", [{"max_rows": 4}, {"max_rows": 7, "max_tokens": 11}, {"kv_blocks": 5, "max_rows": 9}]
)
def test_exact_in_company_and_at_any_chunk(limits: dict[str, int]) -> None:
    alone = engine()
    expected = scored(alone)
    run(alone, expected)
    busy = engine(**limits)
    others = [busy.add(PROMPT[:n], SamplingParams(max_tokens=12, seed=n, ignore_eos=True))[0] for n in (40, 20)]
    found = [scored(busy), scored(busy)]
    others += busy.add(PROMPT, SamplingParams(max_tokens=9, seed=1, ignore_eos=True))
    run(busy, *others, *found)
    assert {(s.cached, tuple(s.tokens)) for s in found} <= {(n, tuple(expected.tokens)) for n in (0, 16, 32)}
    assert all(s.scores == expected.scores and s.logprobs == expected.logprobs for s in found)


def test_a_scored_prompt_reads_nothing_from_the_cache_and_leaves_it_for_others() -> None:
    one = engine()
    first, again, plain = scored(one), scored(one), one.add(PROMPT, SamplingParams(max_tokens=1))[0]
    run(one, first, again, plain)
    assert first.scores == again.scores
    (later,) = one.add(PROMPT, SamplingParams(max_tokens=1))
    run(one, later)
    assert (again.cached, later.cached) == (0, 32)


def test_scoring_alone_writes_nothing_and_may_fill_the_context() -> None:
    one = engine()
    reference = scored(one)
    run(one, reference)
    sequence = scored(one, draws=False)
    run(one, sequence)
    assert list(sequence.tokens) == PROMPT
    assert sequence.scores == reference.scores
    whole = PROMPT + PROMPT[:19]
    (full,) = one.add(whole, SamplingParams(), prompt_logprobs=0, draws=False)
    run(one, full)
    assert full.scores
    assert len(full.scores.logprobs) == 63
    with pytest.raises(ContextError, match=r"64 tokens; the context holds 64, and needs one"):
        one.add(whole, SamplingParams(), prompt_logprobs=0)
    with pytest.raises(InputError, match=r"prompt_logprobs is 51"):
        one.add(PROMPT, SamplingParams(), prompt_logprobs=51)


def test_what_befalls_one_sequence_is_not_the_others_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    good, bad = (one.add(PROMPT[:5], SamplingParams(max_tokens=6, seed=i, ignore_eos=True))[0] for i in range(2))
    append = Engine._append

    def fails(self: Engine, sequence: Sequence, token: int) -> None:
        if sequence is bad:
            raise RuntimeError("its text cannot be decoded")
        append(self, sequence, token)

    monkeypatch.setattr(Engine, "_append", fails)
    run(one, good)
    assert (bad.finish_reason, str(bad.error)) == ("abort", "its text cannot be decoded")
    assert good.error is None


@pytest.mark.parametrize("priority", [101, -101, 10**30])
def test_priorities_have_bounds(priority: int) -> None:
    with pytest.raises(InputError, match=r"priority is -?1"):
        engine().add(PROMPT, SamplingParams(), priority=priority)
