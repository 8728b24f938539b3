from __future__ import annotations

from typing import Any

import pytest

from hasten.engine.request import SamplingParams, choice_seed
from hasten.errors import InputError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5, must be 0, or between 1e-05 and 100000"),
        ({"temperature": float("nan")}, "temperature is nan, must be a number"),
        ({"temperature": float("inf")}, "temperature is inf, must be a number"),
        ({"temperature": 1e-37}, "temperature is 1e-37"),
        ({"temperature": 10**400}, "must be 0, or between"),
        ({"top_k": 99999999999}, "top_k is 99999999999"),
        ({"max_tokens": 2**31}, "max_tokens is 2147483648"),
        ({"n": 10**9}, "n is 1000000000, must be between 1 and 4096"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is 1e"),
        ({"temperature": "hot"}, "temperature is hot, must be a number"),
        ({"top_p": 0}, "top_p is 0, must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5, must be a whole number"),
        ({"min_p": 2}, "min_p is 2"),
        ({"n": 0}, "n is 0, must be between 1 and 4096"),
        ({"n": True}, "n is True, must be a whole number"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 17}, "min_tokens is 17, must be max_tokens 16 or less"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": ["a", ""]}, "stop is"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is"),
        ({"temperature": None}, "temperature is None"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5, must be token ids"),
        ({"typical_p": 0}, "typical_p is 0, must be above 0 and at most 1"),
        ({"typical_p": "x"}, "typical_p is x, must be a number"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101, must be between -100 and 100"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 is nan, must be a number"),
        ({"logit_bias": {"1": 1}}, "logit_bias is {'1': 1}, must be a dict from token ids"),
        ({"logit_bias": [1]}, "logit_bias is [1], must be a dict from token ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids is [], must be token ids, one at least"),
        ({"allowed_token_ids": [1.5]}, "allowed_token_ids is [1.5]"),
        ({"bad_words": "word"}, "bad_words is word, must be a list of texts that are not empty"),
        ({"bad_words": ["fine", " "]}, "bad_words is ['fine', ' ']"),
    ],
)
def test_values_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(**given)
    assert message in error.value.message


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_what_may_be_absent() -> None:
    params = SamplingParams(max_tokens=None, seed=None, logprobs=None, stop=None, min_tokens=100)
    assert params.stops == ()
    assert SamplingParams(stop="x").stops == ("x",)


def test_choices_draw_differently_and_repeat() -> None:
    seeds = [choice_seed(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(100)]
    assert len(set(seeds)) == 300
    assert all(0 <= s < 2**64 for s in seeds)
    assert choice_seed(0, 0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0, as published
