"""The engine's nouns: how to sample, what a request asks, how far a sequence is, what comes back. No numerics here."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hasten.errors import InputError

if TYPE_CHECKING:
    from hasten.engine.constraints import Constraints
    from hasten.engine.guidance import Guide

FinishReason = Literal["stop", "length", "abort"]

_MASK = 2**64 - 1
_LARGEST = 2**31 - 1
MAX_CHOICES = 4096
MAX_BIAS = 100.0
"""Either way, as OpenAI's interface has it: such a bias all but bans a token, or all but forces it."""
COLDEST, HOTTEST = 1e-5, 1e5
"""Temperatures other than 0: beyond these, float32 cannot divide logits by them."""


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an output must look like; exactly one of these. Raises InputError where none or several are given."""

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as a text or an object: the output is a JSON text that it accepts."""
    regex: str | None = None
    """The whole output matches, in the syntax of Rust's regex crate: no look-around, no references back."""
    choice: list[str] | tuple[str, ...] | None = None
    """The output is one of these."""
    grammar: str | None = None
    """In Lark's syntax as llguidance reads it; what it calls `start` is the whole output."""
    json_object: bool | None = None
    """True: the output is some JSON object."""

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise InputError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}, must have one of {', '.join(vars(self))}"
            )
        kind, check = given[0], _check
        value = getattr(self, kind)
        check(kind != "json" or isinstance(value, str | Mapping), "structured_outputs.json", value, "a JSON schema")
        check(kind != "json_object" or value is True, "structured_outputs.json_object", value, "true or false")
        check(
            kind not in ("regex", "grammar") or (isinstance(value, str) and bool(value)),
            f"structured_outputs.{kind}",
            value,
            "a text that is not empty",
        )
        check(
            kind != "choice"
            or (isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(c, str) and c for c in value)),
            "structured_outputs.choice",
            value,
            "a list of texts that are not empty",
        )

    @property
    def kind(self) -> str:
        """The name of what is given."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name, value in vars(self).items() if value is not None and value is not False]


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. Defaults draw from the model's own distribution, sixteen tokens at most.

    Raises InputError for values that make no sense; an argument that does not exist is a TypeError naming it.
    """

    n: int = 1
    """Choices: independent continuations of one prompt."""
    temperature: float = 1.0
    """0: always the likeliest token. Else 1e-5 or more."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """Of locally typical sampling (Meister et al. 2022), after the other filters; 1: all."""
    max_tokens: int | None = 16
    """None: as many as the context holds."""
    min_tokens: int = 0
    """Tokens that end the output are not drawn before there are so many; stop texts pass until then."""
    stop: str | list[str] | tuple[str, ...] | None = None
    """Texts that end the output."""
    include_stop_str_in_output: bool = False
    """Whether the text of `stop` that ended the output is part of it."""
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    seed: int | None = None
    """None: another one for each request."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    """How many of the likeliest tokens to give log-probabilities of, besides the drawn one's own."""
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    """Token id: what is added to its logit, -100 to 100, before penalties, temperature and filters."""
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    """Only these are drawn. Where other bans leave none of them, the likeliest of them is."""
    bad_words: list[str] | tuple[str, ...] | None = None
    """Texts that are not written: where a word's tokens but for the last were just drawn, the last is not, be it at the
    beginning of the output or after a space. Spelled with other tokens the text may still appear."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must look like, in which case it ends where it is complete, and not where the model likes."""

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            _check_kind(name, getattr(self, name), kind)
        _check(1 <= self.n <= MAX_CHOICES, "n", self.n, f"between 1 and {MAX_CHOICES}")
        _check(
            self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST,
            "temperature",
            self.temperature,
            f"0, or between {COLDEST:g} and {HOTTEST:g}",
        )
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(-1 <= self.top_k <= _LARGEST, "top_k", self.top_k, "between 0 and 2**31 - 1 (0: all tokens)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _check(0 < self.typical_p <= 1, "typical_p", self.typical_p, "above 0 and at most 1")
        _check(
            self.max_tokens is None or 1 <= self.max_tokens <= _LARGEST,
            "max_tokens",
            self.max_tokens,
            "between 1 and 2**31 - 1",
        )
        _check(0 <= self.min_tokens <= _LARGEST, "min_tokens", self.min_tokens, "between 0 and 2**31 - 1")
        if self.max_tokens is not None:
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"max_tokens {self.max_tokens} or less",
            )
        _check(self.seed is None or 0 <= self.seed <= _MASK, "seed", self.seed, "between 0 and 2**64 - 1")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "between -2 and 2")
        _check(
            0.01 <= self.repetition_penalty <= 100,
            "repetition_penalty",
            self.repetition_penalty,
            "between 0.01 and 100",
        )
        _check(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "0 or more")
        _check(all(isinstance(s, str) and s for s in self.stops), "stop", self.stop, "texts that are not empty")
        kept = self.include_stop_str_in_output
        _check(isinstance(kept, bool), "include_stop_str_in_output", kept, "true or false")
        _check(_are_tokens(self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids")
        self._check_constraints()

    def _check_constraints(self) -> None:
        guided = self.structured_outputs
        if guided is not None:
            _check(
                isinstance(guided, StructuredOutputsParams),
                "structured_outputs",
                guided,
                "StructuredOutputsParams",
            )
            _check(not self.ignore_eos, "ignore_eos", self.ignore_eos, "false with structured_outputs")
            _check(self.min_tokens == 0, "min_tokens", self.min_tokens, "0 with structured_outputs")
        bias, allowed, words = self.logit_bias, self.allowed_token_ids, self.bad_words
        if bias is not None:
            _check(isinstance(bias, Mapping) and _are_tokens(tuple(bias)), "logit_bias", bias, "a dict from token ids")
            for token, value in bias.items():
                _check_kind(f"logit_bias of token {token}", value, _NUMBER)
                _check(
                    -MAX_BIAS <= value <= MAX_BIAS,
                    f"logit_bias of token {token}",
                    value,
                    f"between -{MAX_BIAS:g} and {MAX_BIAS:g}",
                )
        _check(
            allowed is None or (_are_tokens(allowed) and len(allowed) > 0),
            "allowed_token_ids",
            allowed,
            "token ids, one at least",
        )
        _check(
            words is None or (isinstance(words, list | tuple) and all(isinstance(w, str) and w.strip() for w in words)),
            "bad_words",
            words,
            "a list of texts that are not empty",
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_WHOLE: tuple[type | tuple[type, ...], str] = (int, "a whole number")
_NUMBER: tuple[type | tuple[type, ...], str] = ((int, float), "a number")
_KINDS = {
    "n": _WHOLE,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _WHOLE,
    "min_p": _NUMBER,
    "typical_p": _NUMBER,
    "max_tokens": _WHOLE,
    "min_tokens": _WHOLE,
    "seed": _WHOLE,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "logprobs": _WHOLE,
}
_OPTIONAL = frozenset({"max_tokens", "seed", "logprobs"})


def _check_kind(name: str, value: object, kind: tuple[type | tuple[type, ...], str]) -> None:
    if value is None and name in _OPTIONAL:
        return
    fits = isinstance(value, kind[0]) and not isinstance(value, bool)
    _check(fits and (not isinstance(value, float) or math.isfinite(value)), name, value, kind[1])


def _are_tokens(values: object) -> bool:
    return values is None or (
        isinstance(values, list | tuple)
        and all(isinstance(t, int) and not isinstance(t, bool) and abs(t) <= _LARGEST for t in values)
    )


def _check(fine: bool, name: str, value: object, must: str) -> None:
    if not fine:
        raise InputError(f"{name} is {value}, must be {must}")


@dataclass(frozen=True)
class Logprob:
    """A natural logarithm of a token's probability in the model's own distribution, and the token's text."""

    logprob: float
    decoded_token: str
    rank: int | None = None
    """1 for the likeliest; None where the token is not among those asked for."""


@dataclass(frozen=True)
class CompletionOutput:
    """One choice. `logprobs` has for each token a dict from token id: the drawn token's first, then the likeliest."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    """The token of stop_token_ids, or the text of stop, that ended it; None where it ended otherwise."""


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and what came of it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class PromptScores:
    """What the model said of its own prompt: for each of its tokens but the first."""

    top: int
    """How many of the likeliest tokens are noted besides the prompt's own."""
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each scored token, `top` pairs of token and log-probability."""


@dataclass(eq=False)
class Sequence:
    """One choice on its way: its tokens, and where their keys and values are.

    Tokens [0, computed) are in the cache; blocks[i] holds positions [i * block_size, (i + 1) * block_size).
    """

    tokens: array[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    limit: int
    """Tokens, the prompt's included, at which it ends."""
    constraints: Constraints | None = None
    """On what it may draw, where the parameters' numbers alone do not say it."""
    guide: Guide | None = None
    """What its output must look like, followed as far as it was drawn."""
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as they were asked for."""
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached: int = 0
    """Tokens that were found in the cache when it was last admitted."""
    preemptions: int = 0
    priority: int = 0
    """Lower runs first."""
    rank: tuple[int, int] = (0, 0)
    """Its place in the scheduler's order: smaller goes first."""
    salt: bytes = b""
    """Where the names of its blocks begin: sequences share blocks only under one salt."""
    scores: PromptScores | None = None
    """Of the prompt, where they were asked for."""
    error: Exception | None = None
    """What befell it alone; it is then aborted."""

    @property
    def output(self) -> array[int]:
        return self.tokens[self.prompt_length :]

    @property
    def remaining(self) -> int:
        """Tokens that the program has yet to see: 1 while decoding."""
        return len(self.tokens) - self.computed


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice of a request, by splitmix64 (Steele, Lea and Flood 2014): choices differ, and repeat."""
    z = (seed + (choice + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
