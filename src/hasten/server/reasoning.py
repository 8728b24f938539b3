"""What a model thinks aloud, told from what it answers: <think> ... </think> at the beginning of its text."""

from __future__ import annotations

from hasten.engine.guidance import Thought
from hasten.server.texts import split_at

OPEN, CLOSE = "<think>", "</think>"


def thinks(template: str) -> bool:
    """Whether a chat template is of a model that thinks aloud."""
    return CLOSE in template or OPEN in template


class Reasoning:
    """Splits one answer as it comes. `inside`: the prompt has opened the thought already."""

    def __init__(self, inside: bool) -> None:
        self._state = "inside" if inside else "before"
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """(thought, answer) that are new and certain."""
        text, self._held = self._held + text, ""
        thought = ""
        if self._state == "before":
            start = text.lstrip()
            if start.startswith(OPEN):
                self._state, text = "inside", start.removeprefix(OPEN)
            elif OPEN.startswith(start):
                self._held = text
                return "", ""
            else:
                self._state = "after"
        if self._state == "inside":
            thought, rest, found = split_at(text, CLOSE)
            if not found:
                self._held = rest
                return thought, ""
            self._state, text = "gap", rest
        if self._state == "gap":  # the blank lines between thought and answer are neither's
            text = text.lstrip("\n")
            if text:
                self._state = "after"
        return thought, text

    def finish(self) -> tuple[str, str]:
        """What was held back to the end."""
        rest, self._held = self._held, ""
        return (rest, "") if self._state == "inside" else ("", rest)


def opened(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought."""
    return prompt.rstrip().endswith(OPEN)


def thought(template: str, prompt: str) -> Thought | None:
    """What may stand before an answer to a rendered prompt; None where prompt or model leave no room for it."""
    closed = prompt.rstrip().endswith(CLOSE)
    return Thought(OPEN, CLOSE, opened(prompt)) if thinks(template) and not closed else None
