"""Bias, allowed tokens, bad words and min_tokens, through the engine on a small model."""

from __future__ import annotations

from array import array
from collections.abc import Collection

import numpy as np
import pytest
from support import tiny_graph

from hasten.backends import native
from hasten.backends.batch import Limits
from hasten.checkpoint import random_weights
from hasten.engine.constraints import bitmask, constraints_for
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams, Sequence
from hasten.errors import InputError

GRAPH = tiny_graph(vocabulary=70)
LIMITS = Limits(context=64, max_tokens=48, max_sequences=4, max_rows=4, block_size=16, kv_blocks=16, threads=1)
EOS = 5


class Letters:
    """A tokenizer of one token a letter: a is 10; a space joins the letter that follows it, as token + 26."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        spaced = [(ord(c) - 97 + 10, i > 0 and text[i - 1] == " ") for i, c in enumerate(text) if c != " "]
        return [token + 26 * after for token, after in spaced]


class Engines(Engine):
    def write(self, params: SamplingParams, prompt: Collection[int] = (1, 2, 3)) -> list[int]:
        (sequence,) = self.add(list(prompt), params)
        while self.busy:
            self.step()
        return sequence.output.tolist()


@pytest.fixture(scope="module")
def engine() -> Engines:
    program = native.compile(GRAPH, random_weights(GRAPH, "f32"), LIMITS)
    return Engines(program, GRAPH.vocabulary, eos_token_ids=[EOS])


def how(seed: int, **changes: object) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": 20, "ignore_eos": True, "temperature": 1.5} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}], ids=repr)
def test_only_allowed_tokens_are_drawn(engine: Engines, changes: dict[str, float]) -> None:
    found = [t for seed in range(5) for t in engine.write(how(seed, allowed_token_ids=[8, 32, 69], **changes))]
    assert set(found) <= {8, 32, 69}
    assert len(set(found)) > 1 or "temperature" in changes


def test_biased_tokens_are_forced_or_gone(engine: Engines) -> None:
    assert engine.write(how(1, logit_bias={40: 100})) == [40] * 20
    free = [t for seed in range(10) for t in engine.write(how(seed))]
    often = max(set(free), key=free.count)
    assert often not in [t for seed in range(10) for t in engine.write(how(seed, logit_bias={often: -100}))]


def test_logprobs_stay_the_models_own(engine: Engines) -> None:
    (forced,) = engine.add([1, 2, 3], how(1, logit_bias={40: 100}, max_tokens=1, logprobs=70))
    (free,) = engine.add([1, 2, 3], how(1, max_tokens=1, logprobs=70))
    while engine.busy:
        engine.step()
    assert forced.top == free.top
    assert forced.logprobs[0] == dict(free.top[0])[40]


def test_the_most_typical_token_is_drawn(engine: Engines) -> None:
    (likeliest,) = engine.add([1, 2, 3], how(1, temperature=0, max_tokens=1, logprobs=70))
    while engine.busy:
        engine.step()
    logprob = dict(likeliest.top[0])
    entropy = -sum(np.exp(v) * v for v in logprob.values())
    typical = min(logprob, key=lambda t: abs(-logprob[t] - entropy))
    assert typical != likeliest.output[0]
    for seed in range(3):
        assert engine.write(how(seed, typical_p=1e-6, temperature=1, max_tokens=1)) == [typical]


def test_nothing_ends_the_output_before_min_tokens(engine: Engines) -> None:
    for seed in range(5):
        changes = {"ignore_eos": False, "logit_bias": {EOS: 50, 6: 50}, "stop_token_ids": [6, 10**6], "min_tokens": 7}
        found = engine.write(how(seed, **changes))
        assert len(found) == 8
        assert not {EOS, 6} & set(found[:7])
        assert found[7] in (EOS, 6)
    kept = engine.write(how(0, logit_bias={EOS: 50}, min_tokens=7))
    assert kept == [EOS] * 20  # ignore_eos: it ends nothing


def bans(words: list[str], output: list[int], prompt: Collection[int] = (1,), **changes: object) -> list[int]:
    params = SamplingParams(bad_words=words, **changes)  # type: ignore[arg-type]
    constraints = constraints_for(params, 70, [EOS], Letters())
    assert constraints is not None
    choice = Sequence(array("i", [*prompt, *output]), len(prompt), params, 0, 60)
    return sorted(constraints.banned(choice).tolist())


def test_the_last_token_of_a_bad_word_is_banned_where_the_others_were_written() -> None:
    a, b, c = 10, 11, 12
    assert bans(["a"], []) == [a, a + 26]  # alone, and after a space
    assert bans(["abc"], [a]) == []
    assert bans(["abc"], [3, a, b]) == [c]
    assert bans(["abc"], [3, a + 26, b]) == [c]
    assert bans(["abc"], [a, 3, b]) == []
    assert bans(["abc", "bb", "c"], [a, b]) == [b, c, c, c + 26]
    assert bans(["abc"], [b], prompt=[a]) == []  # words that begin in the prompt are the prompt's affair
    assert bans(["aa"], [a]) == [a]
    assert bans(["c"], [], min_tokens=1) == [EOS, c, c + 26]
    assert bans(["c"], [7], min_tokens=1) == [c, c + 26]


def test_bad_words_are_not_written() -> None:
    program = native.compile(GRAPH, random_weights(GRAPH, "f32"), LIMITS)
    engine = Engines(program, GRAPH.vocabulary)
    free = engine.write(how(3))
    pair = "".join(chr(97 + t - 10) for t in (14, 20))
    forced = {"logit_bias": {14: 9, 20: 9}, "max_tokens": 40}
    assert [14, 20] in [engine.write(how(3, **forced))[i : i + 2] for i in range(40)]
    engine.tokenizer = _WithStream()  # type: ignore[assignment]
    found = engine.write(how(3, bad_words=[pair], **forced))
    assert {14, 20} <= set(found)
    assert [14, 20] not in [found[i : i + 2] for i in range(40)]
    assert engine.write(how(3, bad_words=["zzzz"])) == free


class _WithStream(Letters):
    class _Silent:
        def push(self, token: int) -> str:
            return ""

        def finish(self) -> str:
            return ""

    def stream(self, skip_special: bool = True) -> _Silent:
        return self._Silent()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit_bias": {70: 1}}, "logit_bias names token 70, which is not in the vocabulary of 70 tokens"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids names token -1"),
        ({"bad_words": ["a"]}, "bad_words need a tokenizer"),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "leave no token to draw"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(engine: Engines, given: dict[str, object], message: str) -> None:
    for ask in (engine.check, engine.add):
        with pytest.raises(InputError, match=message):
            ask([1], SamplingParams(**given))  # type: ignore[arg-type]
    assert not engine.busy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bad_words": ["\u00e9"]}, "bad_words names token"),
        ({"bad_words": ["a", "b"], "allowed_token_ids": [10, 11, 36]}, "leave no token to draw"),
    ],
)
def test_bad_words_that_cannot_be_obeyed(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        constraints_for(SamplingParams(**given), 70, [EOS], Letters())  # type: ignore[arg-type]


def test_bans_that_leave_nothing_for_one_step_do_not_bind_it() -> None:
    program = native.compile(GRAPH, random_weights(GRAPH, "f32"), LIMITS)
    engine = Engines(program, GRAPH.vocabulary, _WithStream())  # type: ignore[arg-type]
    assert engine.write(how(0, allowed_token_ids=[10], bad_words=["aa"])) == [10] * 20


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 70])
def test_a_bitmask_has_a_bit_a_token(vocabulary: int) -> None:
    tokens = {0, vocabulary - 1, vocabulary // 2}
    mask = bitmask(tokens, vocabulary)
    assert (mask.dtype, mask.shape) == (np.uint32, (-(-vocabulary // 32),))
    assert {t for t in range(len(mask) * 32) if int(mask[t // 32]) >> t % 32 & 1} == tokens
