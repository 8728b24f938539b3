"""Texts to token ids for requests: a long text keeps neither the event loop nor other texts waiting."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from hasten.errors import ContextError
from hasten.server.config import Config
from hasten.server.errors import RequestError
from hasten.server.protocol import CompletionRequest, Generation

INLINE = 4096
"""Characters of text that are encoded at once; longer ones on another thread, so that the event loop goes on."""


class Encoder:
    """Long texts are encoded one at a time, on a thread of their own: they never fill the threads that others need."""

    def __init__(self, config: Config) -> None:
        self._served, self._limits = config.served, config.limits
        self._thread = ThreadPoolExecutor(1, "hasten-encode")

    async def prompts(self, request: CompletionRequest) -> list[list[int]]:
        """The token ids of each prompt of a request. Raises RequestError or ContextError for what is too much."""
        given = request.prompt
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        listed: list[str | list[int]] = given if several else [given]
        if len(listed) > self._limits.prompts:
            raise RequestError(f"prompt holds {len(listed)}, at most {self._limits.prompts} are taken", "prompt")
        return [await self.prompt(p, request) if isinstance(p, str) else _truncated(p, request) for p in listed]

    async def prompt(self, text: str, request: Generation, special: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a prompt. Raises ContextError for one that cannot fit, before it is cut into tokens."""
        context = self._served.context
        most = context * self._served.tokenizer.longest_token
        if request.truncate_prompt_tokens is None and len(text) > most:
            raise ContextError(
                f"the prompt has {len(text)} characters; the context of {context} tokens holds at most {most}",
                "shorten the prompt",
            )
        return _truncated(await self.encode(text, special, field), request)

    async def encode(self, text: str, special: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a text. Raises RequestError, which names `field`, where it is too long; InputError for text that
        is none."""
        most = self._limits.prompt_characters
        if len(text) > most:
            raise RequestError(f"{field} has {len(text)} characters, at most {most} are taken", field)
        encode = self._served.tokenizer.encode
        if len(text) <= INLINE:
            return encode(text, special)
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode, text, special)


def _truncated(prompt: list[int], request: Generation) -> list[int]:
    """The last tokens of a prompt, where a request wants no more of it."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep < 1:
        raise RequestError(f"truncate_prompt_tokens is {keep}, must be 1 or more", "truncate_prompt_tokens")
    return prompt[-keep:]
