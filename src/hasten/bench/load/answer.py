"""What one event of an OpenAI stream says, checked field by field: nothing a server sends is taken on trust."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hasten.bench.load.http import AnswerError, shown

DONE = b"[DONE]"
TEXTS = ("content", "reasoning_content", "reasoning", "refusal")  # of a chat delta: any of them is output


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """`output`: there is text in it that a user sees. A role, an empty text or a mere finish_reason is none."""

    output: bool
    finish_reason: str | None
    usage: Usage | None


def parse(data: bytes) -> Chunk:
    """Raises AnswerError for what is no chunk of a completion or a chat completion, and for an error in its place."""
    value = parse_object(data, "an event")
    if value.get("error") is not None:
        raise AnswerError(f"an error within the stream: {message(value)}")
    choices = value.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise AnswerError(f"choices is {kind(choices)}, must be a list of objects")
    output, finish = False, None
    for choice in choices:
        output = _has_text(choice) or output
        reason = choice.get("finish_reason")
        if reason is not None and not isinstance(reason, str):
            raise AnswerError(f"finish_reason is {kind(reason)}, must be a string")
        finish = shown(reason, 20) if reason else finish
    return Chunk(output, finish, _usage(value.get("usage")))


def _has_text(choice: dict[str, Any]) -> bool:
    if "delta" not in choice:
        return bool(_text(choice, "text"))
    delta = choice["delta"]
    if not isinstance(delta, dict):
        raise AnswerError(f"delta is {kind(delta)}, must be an object")
    texts = [bool(_text(delta, name)) for name in TEXTS]  # each is checked
    return any(texts) or bool(delta.get("tool_calls"))


def _text(holder: dict[str, Any], name: str) -> str | None:
    value = holder.get(name)
    if value is not None and not isinstance(value, str):
        raise AnswerError(f"{name} is {kind(value)}, must be a string")
    return value


def _usage(value: Any) -> Usage | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise AnswerError(f"usage is {kind(value)}, must be an object")
    details = value.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(
        _count(value.get("prompt_tokens"), "prompt_tokens"),
        _count(value.get("completion_tokens", 0), "completion_tokens"),
        _count(cached or 0, "cached_tokens"),
    )


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= 1 << 32:
        raise AnswerError(f"usage.{name} is {shown(repr(value)[:80], 30)}, must be a whole number from 0")
    return value


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise AnswerError(f"{what} is not valid JSON: {shown(data)}") from None
    if not isinstance(value, dict):
        raise AnswerError(f"{what} is {kind(value)}, must be an object")
    return value


def message(value: dict[str, Any]) -> str:
    """The text of an error document: {"error": {"message"}} or the forms that other servers give it."""
    error = value.get("error", value)
    found = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    return shown(found if isinstance(found, str) else repr(found)[:400], 200)


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null or missing"}
    return names.get(type(value), "a number")
