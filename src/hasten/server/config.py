"""What a server is told once: the model that it serves, and how much a client may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True)
class HttpLimits:
    """Bounds on what one client can make the server do."""

    body: int = 8 << 20
    """Bytes of a request."""
    body_seconds: float = 60.0
    """Within which a request must have arrived."""
    write_seconds: float = 120.0
    """That a client may leave what is sent to it unread."""
    requests: int = 1024
    """At once, waiting ones included."""
    connections: int = 2048
    prompts: int = 128
    """In one completion request."""
    prompt_characters: int = 1 << 20
    """Of one text that is cut into tokens, also where few of them are kept."""
    messages: int = 4096
    tools: int = 128
    n: int = 16
    logprobs: int = 20
    values: int = 500_000
    """Log-probabilities in one answer, over all of its tokens and choices."""
    stops: int = 16
    stop_length: int = 256
    """Characters of one stop text."""
    grammars: int = 16
    """Requests that may wait for their grammar to be compiled, besides those whose is."""
    ids: int = 4096
    """Token ids, bad words or biases in one field."""


@dataclass(frozen=True)
class Served:
    """The model as clients see it."""

    names: tuple[str, ...]
    """What it answers to; the first is what answers say."""
    tokenizer: Tokenizer
    context: int
    vocabulary: int
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json: the sampling of requests that name none."""
    template: str = ""
    """The chat template's source, by which the forms of tool calls and reasoning are known."""
    created: int = 0


@dataclass(frozen=True)
class Config:
    served: Served
    api_keys: tuple[str, ...] = ()
    """None: anybody may ask."""
    hosts: frozenset[str] = frozenset()
    """Names, in lower case, that a request may call this server by in its Host header; none: any."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    version: str = "0"
    """Of hasten, as the OpenAPI description states it."""
