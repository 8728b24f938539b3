"""What every answer holds: its head, and what it took in tokens."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from hasten.server.config import Served
from hasten.server.protocol import Generation
from hasten.server.streams import DONE, encoded, encoded_apart, event
from hasten.server.ticket import Delta

Object = dict[str, Any]


def head(served: Served, prefix: str, kind: str) -> Object:
    """The fields that an answer and all of its chunks begin with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": served.names[0],
    }


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


async def events(parts: AsyncIterator[Object], head: Object, usage: Usage, request: Generation) -> AsyncIterator[bytes]:
    """Server-sent events of choices' parts, with the usage last where the request wants it, and the end."""
    options = request.stream_options
    with_usage = options is not None and bool(options.include_usage)
    blank = {"usage": None} if with_usage else {}
    async for part in parts:
        yield event(await encoded_apart({**head, "choices": [part], **blank}))
    if with_usage:
        yield event(encoded({**head, "choices": [], "usage": usage.document}))
    yield DONE
