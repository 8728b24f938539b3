"""Log-probabilities in the two forms that OpenAI's clients read: one token's value is one float, wherever it stands."""

from __future__ import annotations

import re
from typing import Any, Protocol

from hasten.checkpoint.tokenizer import REPLACEMENT

LEAST = -9999.0
"""What minus infinity is shown as, which JSON cannot say."""
KEPT = 1 << 16
Top = list[tuple[int, float]]


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int], skip_special: bool = True) -> str: ...
    def token(self, id: int) -> str | None: ...


class Spelling:
    """Single tokens as text, and as bytes where they are no whole characters."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[tuple[int | None, int], str] = {}
        self._alone: dict[int, str] = {}

    def text(self, before: int | None, token: int) -> str:
        """A token's text where it follows another: alone it would lose its leading space."""
        key = before, token
        found = self._texts.get(key)
        if found is None:
            if len(self._texts) > KEPT:
                self._texts.clear()
                self._alone.clear()
            found = self._texts[key] = self._decode(before, token)
        return found

    def _decode(self, before: int | None, token: int) -> str:
        if before is None:
            return self._tokenizer.decode([token], skip_special=False)
        alone = self._alone.get(before)  # several threads may spell: what one has found another may forget
        if alone is None:
            alone = self._alone[before] = self._tokenizer.decode([before], skip_special=False)
        return self._tokenizer.decode([before, token], skip_special=False)[len(alone) :]

    def bytes(self, token: int, text: str) -> list[int] | None:
        """The token's bytes; None where its text does not say them and its spelling neither."""
        if text and REPLACEMENT not in text:
            return list(text.encode())
        spelling = self._tokenizer.token(token) or ""
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelling):
            return [int(found[1], 16)]
        if spelling and all(letter in BYTE_LETTERS for letter in spelling):
            return [BYTE_LETTERS[letter] for letter in spelling]
        return None

    def name(self, before: int | None, token: int) -> str:
        """The text; `bytes:\\xe4` for a part of a character, as OpenAI writes it."""
        text = self.text(before, token)
        if text and REPLACEMENT not in text:
            return text
        found = self.bytes(token, text)
        if not found:
            return text or self._tokenizer.token(token) or ""
        return "bytes:" + "".join(f"\\x{value:02x}" for value in found)


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies spell bytes (GPT-2): printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(plain)]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


BYTE_LETTERS = _byte_letters()


def completion(
    spelling: Spelling,
    before: int | None,
    tokens: list[int],
    values: list[float | None],
    top: list[Top],
    offset: int,
) -> dict[str, Any]:
    """`logprobs` of the completions endpoint. A value of None is the prompt's first token, which nothing foretold."""
    made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        name = spelling.name(before, token)
        made["tokens"].append(name)
        made["token_logprobs"].append(None if value is None else max(value, LEAST))
        made["text_offset"].append(offset)
        if value is None:
            made["top_logprobs"].append(None)
        else:
            alternatives: dict[str, float] = {}
            for other, likelihood in top[i] if top else []:  # likeliest first: of two with one name that one stays
                alternatives.setdefault(spelling.name(before, other), max(likelihood, LEAST))
            alternatives.setdefault(name, max(value, LEAST))
            made["top_logprobs"].append(alternatives)
        offset += len(spelling.text(before, token))
        before = token
    return made


def chat(
    spelling: Spelling, before: int, tokens: list[int], values: list[float], top: list[Top]
) -> list[dict[str, Any]]:
    """`logprobs.content` of the chat endpoint."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = spelling.text(before, token)
        return {"token": text, "logprob": max(value, LEAST), "bytes": spelling.bytes(token, text)}

    made = []
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        likeliest = top[i] if top else []
        made.append({**entry(token, value), "top_logprobs": [entry(other, v) for other, v in likeliest]})
        before = token
    return made


def prompt(spelling: Spelling, tokens: list[int], values: list[float], top: list[Top]) -> list[Any]:
    """`prompt_logprobs`: for each token but the first an object by token id, the prompt's own first."""
    made: list[Any] = [None]
    for i, (token, value) in enumerate(zip(tokens[1:], values, strict=True)):
        ranks = {other: rank for rank, (other, _) in enumerate(top[i], 1)}
        entries = {token: value, **dict(top[i])}
        made.append(
            {
                str(other): {
                    "logprob": max(likelihood, LEAST),
                    "rank": ranks.get(other),
                    "decoded_token": spelling.text(tokens[i], other),
                }
                for other, likelihood in entries.items()
            }
        )
    return made
