"""Which tools a request offers, and what it insists on: `tools`, `tool_choice` and `parallel_tool_calls`.

Where an answer must be a call, a grammar says what it looks like, arguments by the tool's own schema included.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hasten.checkpoint.tokenizer import Tokenizer
from hasten.engine.guidance import BLANKS, Guidance
from hasten.engine.request import StructuredOutputsParams
from hasten.errors import InputError
from hasten.server.config import Config
from hasten.server.errors import RequestError, unsupported
from hasten.server.protocol import ChatRequest
from hasten.server.tools import ARGS, CLOSE, OPEN, TOOL_CALLS, Family, family

Object = dict[str, Any]
NO_PARAMETERS: Object = {"type": "object", "properties": {}, "additionalProperties": False}
"""As OpenAI reads a function without `parameters`."""


@dataclass(frozen=True)
class Offer:
    """Tools that an answer may call. `must`: it is nothing but calls; `named`: of the one tool that is so called."""

    tools: list[Object]
    family: Family
    must: bool
    named: str | None
    one: bool
    """Not more than one call."""

    @property
    def callable(self) -> list[tuple[int, Object]]:
        """(index in `tools`, function) of those that may be called."""
        functions = [(i, tool["function"]) for i, tool in enumerate(self.tools)]
        return [(i, f) for i, f in functions if self.named in (None, f["name"])]


def offer(body: ChatRequest, config: Config) -> Offer | None:
    """The tools that the template is told of; None for none. Raises RequestError where they cannot be had."""
    must, named = _choice(body)
    if not body.tools or body.tool_choice == "none":
        if must:
            raise RequestError("tool_choice wants a call, and there are no tools", "tool_choice")
        return None
    if len(body.tools) > config.limits.tools:
        raise RequestError(f"tools may hold at most {config.limits.tools}", "tools")
    for i, tool in enumerate(body.tools):
        _check_tool(tool, f"tools[{i}]")
    if named is not None and all(tool["function"]["name"] != named for tool in body.tools):
        raise RequestError(f"tool_choice names '{named[:100]}', which is not among the tools", "tool_choice")
    for field in ("response_format", "structured_outputs") if must else ():
        value = getattr(body, field)
        if value is not None and value != {"type": "text"}:
            raise RequestError(f"{field} only goes with tool_choice 'auto' or 'none'", field)
    found = family(config.served.template)
    if found is None:
        raise unsupported("tools", "this model's chat template knows none that can be read")
    return Offer(body.tools, found, must, named, named is not None or body.parallel_tool_calls is False)


def _choice(body: ChatRequest) -> tuple[bool, str | None]:
    """(whether there must be a call, of which tool)."""
    choice = body.tool_choice
    if choice in (None, "none", "auto", "required"):
        return choice == "required", None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        known = '\'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}}'
        raise RequestError(f"tool_choice must be {known}", "tool_choice")
    return True, function["name"]


def _check_tool(tool: Object, at: str) -> None:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{at} must be of type 'function', with a function that has a name", at)
    parameters = function.get("parameters")
    if parameters is not None and (not isinstance(parameters, dict) or parameters.get("type", "object") != "object"):
        name = f"{at}.function.parameters"
        raise RequestError(f'{name} must be a JSON schema of {{"type": "object"}}', name)


def grammar(offered: Offer, template: str, tokenizer: Tokenizer) -> str:
    """What an answer of nothing but calls looks like, in Lark's syntax as llguidance reads it."""

    def mark(text: str) -> str:
        found = special_token(text, tokenizer)
        return _literal(text) if found is None else f"<[{found}]>"

    def several(call: str, between: str) -> str:
        return call if offered.one else f"{call} ({between} {call})*"

    line = _literal("\n")
    form = "args" if offered.family == "mistral" and ARGS in template else offered.family
    start = {
        # A token may hold the last mark and a line's end: it may end there too, and need not call again.
        "hermes": lambda: (
            several(f"{mark(OPEN)} {line} call {line} {mark(CLOSE)}", line) + ("" if offered.one else f" {line}?")
        ),
        "llama3": lambda: several("call", _literal("; ")),
        "mistral": lambda: f'{mark(TOOL_CALLS)} " "? "[" {several("call", _literal(", "))} "]"',
        "args": lambda: several(f"{mark(TOOL_CALLS)} call", ""),
    }[form]()
    calls = []
    for _, function in offered.callable:
        schema = "%json " + json.dumps(_schema(function))  # a document of its own, so that its references hold
        if form == "args":
            calls.append(f"{_literal(function['name'])} {mark(ARGS)} {schema}")
        else:
            name = json.dumps(function["name"], ensure_ascii=False)
            key = "parameters" if form == "llama3" else "arguments"
            calls.append(_literal(f'{{"name": {name}, "{key}": ') + f' {schema} "}}"')
    return f"start: {start}\ncall: " + "\n    | ".join(calls) + "\n"


def special_token(text: str, tokenizer: Tokenizer) -> int | None:
    """The special token that a text is, which no grammar knows as text; None where it is none."""
    ids = tokenizer.encode(text, special=False)
    return ids[0] if len(ids) == 1 and tokenizer.is_silent(ids[0], True) else None


def special_marks(offered: Offer, tokenizer: Tokenizer) -> bool:
    """Whether the marks of calls may be special tokens, which text leaves out unless it is told not to."""
    return offered.family != "hermes" or special_token(OPEN, tokenizer) is not None


def fault(offered: Offer, guidance: Guidance, error: InputError) -> RequestError:
    """What to say where the grammar of all calls met `error`: which tool's schema is at fault, if one alone is."""
    for i, function in offered.callable if "characters" not in error.message else ():
        try:
            guidance.compile(StructuredOutputsParams(json=_schema(function)))
        except InputError as found:
            name = f"tools[{i}].function.parameters"
            return RequestError(found.message.replace("structured_outputs.json", name, 1), name)
    return RequestError(error.message.replace("structured_outputs.grammar", "the grammar of tools", 1), "tools")


def _schema(function: Object) -> Object:
    parameters = function.get("parameters")
    schema = NO_PARAMETERS if parameters is None else {**parameters, "type": "object"}
    return {**schema, "x-guidance": {"whitespace_pattern": BLANKS}}


def _literal(text: str) -> str:
    return json.dumps(text)
