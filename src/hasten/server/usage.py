"""What a request took, in tokens."""

from __future__ import annotations

from typing import Any

from hasten.server.ticket import Delta


class Usage:
    """Adds up prompts once and answers as they come."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompt = sum(map(len, prompts))
        self.answer = 0
        self._cached: dict[int, int] = {}

    def add(self, number: int, delta: Delta) -> None:
        """A delta of prompt `number`; of its choices the first tells what of the prompt was in the cache."""
        self.answer += len(delta.token_ids)
        if delta.index == 0:
            self._cached.setdefault(number, delta.cached_tokens)

    @property
    def document(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }
