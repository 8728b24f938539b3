"""What requests say: random tokens, as ids or as text, and the JSON around them.

Tokens are keyed by the seed and by what they stand for (a request's number, a block's hash), never by order of
drawing, so the same load sends the same bytes every time, whatever is left out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.bench.load.traces import Arrival
from hasten.errors import InputError

OWN, BLOCK, PREFIX = 3, 4, 5  # streams of random numbers under one seed
WORD = re.compile(r"[a-z]+", re.ASCII)
LEAST_WORDS = 16
TAKEN = ("model", "prompt", "messages", "stream", "stream_options", "max_tokens", "n")

# Words that are one token, with the space before it, in most vocabularies made from English text.
COMMON = re.findall(
    "[a-z]+",
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many off before must well back through years where much your way down should "
    "because long each just state people those too how little good world make very year still see own work men day get "
    "here old life both between being under three never know same last another while us might great go come since "
    "against right came take used house place found part high water home left once without general few keep small",
)


class Prompts:
    """Prompts made of `pieces`: whole numbers for ids, words for text."""

    def __init__(self, pieces: Sequence[str], *, seed: int, prefix: int = 0) -> None:
        self._pieces: NDArray[np.object_] = np.array(pieces, dtype=object)
        self._seed, self._prefix = seed, prefix

    def pieces(self, arrival: Arrival, number: int) -> NDArray[np.object_]:
        """The pieces of request `number`: first what it shares with others, then its own. [arrival.prompt]"""
        shared = [self._draw(PREFIX, 0, self._prefix)] if self._prefix else []
        shared += [self._draw(BLOCK, name, arrival.block) for name in arrival.blocks]
        own = self._draw(OWN, number, max(0, arrival.prompt - sum(map(len, shared))))
        taken: NDArray[np.object_] = self._pieces[np.concatenate([*shared, own])[: arrival.prompt]]
        return taken

    def _draw(self, stream: int, key: int, tokens: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([self._seed, stream, key])
        return generator.integers(0, len(self._pieces), tokens)


class Bodies:
    """Request bodies for /v1/completions (ids or text) or, with `chat`, for /v1/chat/completions."""

    def __init__(
        self,
        prompts: Prompts,
        model: str,
        *,
        text: bool = False,
        chat: bool = False,
        standard: bool = False,
        usage: bool = True,
        temperature: float = 0.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._prompts, self._text, self._chat, self._standard = prompts, text, chat, standard
        self._fields: dict[str, Any] = {"model": model, "stream": True, "temperature": temperature}
        self._extra = dict(extra or {})
        if usage:
            self._fields["stream_options"] = {"include_usage": True}
        if not standard:
            self._fields["ignore_eos"] = True

    def body(self, arrival: Arrival, number: int) -> bytes:
        """The JSON of request `number`. Pieces are digits or plain words, so they need no escaping."""
        fields = {**self._fields, "max_tokens": arrival.new}
        if not self._standard:
            fields["min_tokens"] = arrival.new
        fields |= self._extra
        pieces = self._prompts.pieces(arrival, number)
        if self._chat:
            prompt = f'"messages": [{{"role": "user", "content": "{" ".join(pieces)}"}}]'
        elif self._text:
            prompt = f'"prompt": "{" ".join(pieces)}"'
        else:
            prompt = f'"prompt": [{", ".join(pieces)}]'
        return f"{json.dumps(fields)[:-1]}, {prompt}}}".encode()


def id_pieces(low: int, high: int) -> list[str]:
    """Token ids from `low` up to `high`, without `high`."""
    if not 0 <= low < high <= 1 << 24:
        raise InputError(f"--ids is {low}:{high}, must be LOW:HIGH with 0 <= LOW < HIGH")
    return [str(i) for i in range(low, high)]


def word_pieces(tokens: Sequence[str | None]) -> list[str]:
    """The plain words among a vocabulary's tokens: those that begin with its sign for a space (byte-level or not)."""
    found = [t[1:] for t in tokens if t and t[0] in "\u0120\u2581" and WORD.fullmatch(t[1:])]
    if len(found) < LEAST_WORDS:
        raise InputError(
            f"the tokenizer has {len(found)} plain words, prompts need at least {LEAST_WORDS}",
            "without --tokenizer prompts are made of common English words",
        )
    return found


def parse_extra(text: str) -> dict[str, Any]:
    """The object of --extra. Raises InputError where it is none, or sets what the load sets itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--extra is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError("--extra must be a JSON object", """--extra '{"top_k": 20}'""")
    for name in TAKEN:
        if name in value:
            raise InputError(f"--extra sets {name}, which the load sets itself")
    return value
