"""Tool calls in a model's text, by the family of its chat template.

hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them (Hermes, Qwen)
llama3   the whole text is {"name": ..., "parameters": {...}}, several parted by ";" (Llama 3.1 and later)
mistral  [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...} for each
"""

from __future__ import annotations

import json
import secrets
import string
from dataclasses import dataclass
from typing import Any, Literal

from hasten.server.texts import split_at

Family = Literal["hermes", "llama3", "mistral"]
ALPHABET = string.ascii_letters + string.digits
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """`arguments` is JSON, as the model wrote it where that is an object."""

    id: str
    name: str
    arguments: str

    @property
    def document(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


OTHERS = ("<function=", "<arg_key>", "<tool_calls>")
"""Marks of families that write no JSON, or write it elsewhere: what we could not read is not promised."""


def family(template: str) -> Family | None:
    """The form of tool calls that a chat template teaches its model; None where that is none we can read."""
    if "tools" not in template or any(mark in template for mark in OTHERS):
        return None
    if OPEN in template:
        return "hermes"
    if TOOL_CALLS in template:
        return "mistral"
    return "llama3" if "ipython" in template and '"parameters"' in template else None


class ToolCalls:
    """Parts one answer as it comes into text and calls. What looks like a call and is none stays text.

    `one`: the answer ends with its first call, and what comes later is dropped.
    """

    def __init__(self, family: Family, one: bool = False) -> None:
        self._family, self._one = family, one
        self._mark = {"hermes": OPEN, "mistral": TOOL_CALLS, "llama3": PYTHON_TAG}[family]
        self._held = ""
        self._inside = False
        self._begun = False
        self.count = 0
        """Calls so far."""

    @property
    def full(self) -> bool:
        """Whether nothing later counts."""
        return self._one and self.count > 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """(text, calls) that are new and certain."""
        if self.full:
            return "", []
        self._held += text
        made = ""
        calls: list[Call] = []
        if self._family == "llama3" and not self._begun and (start := self._held.lstrip()):
            self._inside = start[0] == "{"
            self._begun = self._inside or not PYTHON_TAG.startswith(start)
        while True:
            if not self._inside:
                before, self._held, self._inside = split_at(self._held, self._mark)
                made += before if not self.count or before.strip() else ""
            if not self._inside or self._family != "hermes":
                return made, calls
            body, rest, closed = split_at(self._held, CLOSE)
            if not closed:
                return made, calls
            self._held, self._inside = rest, False
            found = self._number(_object_call(body.strip()))
            calls += found
            made += "" if found else OPEN + body + CLOSE
            if found and self._one:
                self._held = ""
                return made, calls

    def finish(self) -> tuple[str, list[Call]]:
        """The rest, once no text will follow."""
        rest, self._held = self._held, ""
        if not self._inside:
            return rest, []
        read = {"hermes": _object_call, "mistral": _mistral_calls, "llama3": _llama_calls}[self._family]
        calls = self._number(read(rest.strip()))
        return ("", calls) if calls else ((self._mark if self._family != "llama3" else "") + rest, [])

    def _number(self, found: list[tuple[str, Any]]) -> list[Call]:
        found = found[:1] if self._one else found
        self.count += len(found)
        length = 9 if self._family == "mistral" else 24  # Mistral's templates insist on nine letters and digits
        prefix = "" if self._family == "mistral" else "call_"
        return [
            Call(prefix + "".join(secrets.choice(ALPHABET) for _ in range(length)), name, arguments)
            for name, arguments in found
        ]


def _object_call(text: str) -> list[tuple[str, str]]:
    """One call written as an object; [] where it is none."""
    try:
        found, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return []
    return _call(found) if not text[end:].strip() else []


def _call(found: Any) -> list[tuple[str, str]]:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return []
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the object as a text
        return [(found["name"], arguments)]
    return [(found["name"], json.dumps(arguments, ensure_ascii=False))] if isinstance(arguments, dict) else []


def _llama_calls(text: str) -> list[tuple[str, str]]:
    text = text.removeprefix(PYTHON_TAG).strip()
    calls = []
    while text:
        try:
            found, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        call = _call(found)
        if not call:
            return []
        calls += call
        text = text[end:].lstrip("; \n")
    return calls


def _mistral_calls(text: str) -> list[tuple[str, str]]:
    if text.startswith("["):
        try:
            found, _ = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        calls = [call for item in found for call in _call(item)]
        return calls if len(calls) == len(found) else []
    calls = []
    for part in text.split(TOOL_CALLS):
        name, _, arguments = part.partition("{")
        name = name.removesuffix(ARGS).strip()
        try:
            found, _ = _DECODER.raw_decode("{" + arguments)
        except (ValueError, RecursionError):
            return []
        if not name or len(name) > 256:
            return []
        calls.append((name, json.dumps(found, ensure_ascii=False)))
    return calls
