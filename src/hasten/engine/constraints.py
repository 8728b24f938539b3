"""Which tokens a sequence may draw next: bias, allowed tokens, bad words, and no end before its time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np

from hasten.backends.batch import Float32, Int32, UInt32
from hasten.engine.request import SamplingParams
from hasten.engine.request import Sequence as Choice
from hasten.errors import InputError


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, special: bool = True) -> list[int]: ...


class Constraints:
    """Of one request, as the arrays that a backend takes; what depends on the output so far is asked for each step.

    Raises InputError for tokens outside the vocabulary, bad words without a tokenizer, and constraints that leave
    nothing to draw.
    """

    def __init__(
        self, params: SamplingParams, vocabulary: int, eos_token_ids: Collection[int], encoder: Encoder | None
    ) -> None:
        bias = params.logit_bias or {}
        allowed = params.allowed_token_ids or ()
        _in_vocabulary("logit_bias", bias, vocabulary)
        _in_vocabulary("allowed_token_ids", allowed, vocabulary)
        words = _bad_words(params.bad_words or (), encoder, vocabulary)
        ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)}
        always = {word[0] for word in words if len(word) == 1}
        early = always | {t for t in ends if 0 <= t < vocabulary} if params.min_tokens else always
        if early.issuperset(allowed or range(vocabulary)):
            raise InputError(
                "allowed_token_ids, bad_words and min_tokens leave no token to draw",
                "allow a token that neither is a bad word nor ends the output",
            )
        self.bias_tokens: Int32 = np.array(list(bias), np.int32)
        self.bias: Float32 = np.array(list(bias.values()), np.float32)
        self._allowed: UInt32 = bitmask(allowed, vocabulary) if allowed else np.zeros(0, np.uint32)
        self._min_tokens = params.min_tokens
        self._always = np.array(sorted(always), np.int32)
        self._early = np.array(sorted(early), np.int32)
        # By the token before the last: its beginnings and what may not follow them.
        self._words: dict[int, list[tuple[list[int], int]]] = {}
        for *before, last in (word for word in words if len(word) > 1):
            self._words.setdefault(before[-1], []).append((before, last))

    def check_beginning(self, mask: UInt32) -> None:
        """Raise InputError where of the tokens of `mask`, with which an output must begin, none may be drawn.

        `mask` has shape [ceil(vocabulary / 32)].
        """
        left = mask & self._allowed if self._allowed.size else mask
        begins = np.unpackbits(left.astype("<u4").view(np.uint8), bitorder="little")  # [vocabulary, rounded up] 0 or 1
        begins[self._always] = 0
        if not begins.any():
            raise InputError(
                "allowed_token_ids and bad_words leave no token with which a structured output begins",
                "allow one, or leave the output's form open",
            )

    def allowed(self, choice: Choice) -> UInt32:
        """A bit for each token that `choice` may draw now; empty: all."""
        if choice.guide is None:
            return self._allowed
        mask = choice.guide.mask(choice.output)
        return mask & self._allowed if self._allowed.size else mask

    def banned(self, choice: Choice) -> Int32:
        """The tokens that `choice` must not draw now."""
        tokens, start = choice.tokens, choice.prompt_length
        bans = self._early if len(tokens) - start < self._min_tokens else self._always
        if len(tokens) == start or tokens[-1] not in self._words:
            return bans
        met = [
            last
            for before, last in self._words[tokens[-1]]
            if len(tokens) - start >= len(before) and tokens[-len(before) :].tolist() == before
        ]
        return np.concatenate([bans, np.array(met, np.int32)])


def constraints_for(
    params: SamplingParams, vocabulary: int, eos_token_ids: Collection[int], encoder: Encoder | None
) -> Constraints | None:
    """What a request is constrained by, or None. Raises as Constraints does."""
    if (
        params.structured_outputs
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
    ):
        return Constraints(params, vocabulary, eos_token_ids, encoder)
    return None


def bitmask(tokens: Iterable[int], vocabulary: int) -> UInt32:
    """[ceil(vocabulary / 32)] a bit for each token, lowest first."""
    bits = np.zeros((vocabulary + 31) // 32 * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _in_vocabulary(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    wrong = next((t for t in tokens if not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise InputError(f"{name} names token {wrong}, which is not in the vocabulary of {vocabulary} tokens")


def _bad_words(words: Sequence[str], encoder: Encoder | None, vocabulary: int) -> list[list[int]]:
    """Token ids of each word as it begins a text, and as it follows a space where that makes another first token."""
    if words and encoder is None:
        raise InputError("bad_words need a tokenizer", "give logit_bias or allowed_token_ids instead")
    found: list[list[int]] = []
    for word in words:
        assert encoder is not None
        first, spaced = (encoder.encode(text, special=False) for text in (word.lstrip(), " " + word.lstrip()))
        forms = [first, spaced] if spaced[:1] != first[:1] and len(spaced) == len(first) else [first]
        for form in forms:
            if not form:
                raise InputError(f"bad_words holds '{word}', which is no token")
            _in_vocabulary("bad_words", form, vocabulary)
            found.append(form)
    return found
