"""Tokens to text as they come: never half a character, never part of a text that may end the output."""

from __future__ import annotations

from typing import Protocol


class TokenStream(Protocol):
    """What Tokenizer.stream() gives: text as soon as its characters are whole."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class TextStream:
    """The text of one output. `push` and `finish` give what is new and certain; `stopped` is the stop text met.

    What might be the beginning of a stop text is held back until it is known not to be; the stop text met is only given
    where it is `kept`. `tokens` may have been fed the prompt; `prompt_rest` is what it then still holds of the prompt's
    text, which is no output.
    """

    def __init__(
        self, tokens: TokenStream, stops: tuple[str, ...] = (), prompt_rest: str = "", *, kept: bool = False
    ) -> None:
        self._tokens = tokens
        self._kept = kept
        self._prompt_rest = prompt_rest
        self._stops = stops
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: int, *, stoppable: bool = True) -> str:
        """Where not `stoppable` (too few tokens yet), stop texts pass through, and end nothing later."""
        return self._give(self._tokens.push(token), stoppable)

    def finish(self) -> str:
        """The rest, once no token will follow."""
        if self.stopped:
            return ""
        given = self._give(self._tokens.finish(), True)
        rest, self._held = self._held, ""
        return given if self.stopped else given + rest

    def _give(self, new: str, stoppable: bool) -> str:
        if self._prompt_rest and new:
            # Where the prompt ended inside a character, that character begins in the output.
            new, self._prompt_rest = new.removeprefix(self._prompt_rest), ""
        if not self._stops:
            return new
        text, self._held = self._held + new, ""
        if not stoppable:
            return text
        found = [(at, stop) for at, stop in ((text.find(stop), stop) for stop in self._stops) if at >= 0]
        if found:
            at, self.stopped = min(found, key=lambda hit: hit[0])
            return text[: at + len(self.stopped) * self._kept]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
