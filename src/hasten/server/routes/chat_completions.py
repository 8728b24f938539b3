"""POST /v1/chat/completions: answers in a conversation, through the model's own chat template."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from hasten.engine.request import SamplingParams
from hasten.server import logprobs, prepare, reasoning, tools
from hasten.server.answers import CHAT_COMPLETION, gives
from hasten.server.app import ERRORS, Context, of, read, takes
from hasten.server.errors import RequestError, unsupported
from hasten.server.protocol import ChatRequest
from hasten.server.streams import DONE, EventStream, Json, answer, event
from hasten.server.ticket import Delta, Ticket
from hasten.server.usage import Usage

Object = dict[str, Any]


def register(app: FastAPI) -> None:
    app.post(
        "/v1/chat/completions",
        responses={200: gives(CHAT_COMPLETION, streams=True), **ERRORS},
        openapi_extra=takes(ChatRequest),
    )(chat_completions)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    context, body = of(request), await read(request, ChatRequest)
    served = context.config.served
    prepare.check_model(served, body.model)
    params, how = _sampling(body, context), prepare.handling(body)
    offered = _tools(body, context)
    text = await prepare.chat_text(body, context.config, offered)
    prompt = prepare.truncated(await prepare.encode(served, text, special=False), body)
    family = tools.family(served.template) if offered else None
    if family and tools.special_marks(family):
        how["skip_special_tokens"] = False
    how |= await context.grammar(params)
    ticket = context.service.submit(prompt, params, **how)
    inside = reasoning.opened(text) if reasoning.thinks(served.template) else None
    run = _Run(context, body, ticket, prompt, [_Choice(prompt[-1], inside, family) for _ in range(params.n)])
    if body.stream:
        return EventStream(run.events(), ticket.cancel)
    return Json(await answer(request, [ticket], run.document()))


def _sampling(body: ChatRequest, context: Context) -> SamplingParams:
    if body.prompt_logprobs is not None:
        raise unsupported("prompt_logprobs", "only /v1/completions has it")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs only goes with logprobs: true", "top_logprobs")
    prepare.check_logprobs("top_logprobs", body.top_logprobs, context.config.limits)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.max_tokens is not None and body.max_tokens != wanted:
        raise RequestError("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    if wanted is not None and wanted < 1:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise RequestError(f"{name} is {wanted}, must be 1 or more", name)
    return prepare.sampling(body, context.config, wanted, (body.top_logprobs or 0) if body.logprobs else None)


def _tools(body: ChatRequest, context: Context) -> list[Object] | None:
    """The tools that the template is told of; None for none. Raises RequestError where they cannot be had."""
    choice = body.tool_choice
    if choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "not supported yet, but for 'auto' and 'none'")
    if body.parallel_tool_calls is False:
        raise unsupported("parallel_tool_calls", "calls cannot be kept to one")
    if not body.tools or choice == "none":
        return None
    if len(body.tools) > context.config.limits.tools:
        raise RequestError(f"tools may hold at most {context.config.limits.tools}", "tools")
    if tools.family(context.config.served.template) is None:
        raise unsupported("tools", "this model's chat template knows none that can be read")
    for i, tool in enumerate(body.tools):
        function = tool.get("function")
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if tool.get("type") != "function" or not named:
            raise RequestError(f"tools[{i}] must be of type 'function', with a function that has a name", f"tools[{i}]")
    return body.tools


class _Choice:
    """One answer on its way: text in, what it adds to thought, answer and calls out."""

    def __init__(self, before: int, inside: bool | None, family: tools.Family | None) -> None:
        self.before = before
        self.begun = False
        self.waiting: list[Object] = []  # log-probabilities of text that is held back
        self._reasoning = None if inside is None else reasoning.Reasoning(inside)
        self._calls = tools.ToolCalls(family) if family else None

    @property
    def calls(self) -> int:
        return self._calls.count if self._calls else 0

    def push(self, text: str, last: bool) -> Object:
        """The `delta` of a chunk: role, reasoning_content, content, tool_calls, as far as there is something new."""
        thought, content = self._reasoning.push(text) if self._reasoning else ("", text)
        if last and self._reasoning:
            more = self._reasoning.finish()
            thought, content = thought + more[0], content + more[1]
        first = self.calls
        calls: list[tools.Call] = []
        if self._calls:
            content, calls = self._calls.push(content)
            if last:
                rest, later = self._calls.finish()
                content, calls = content + rest, calls + later
        made: Object = {"content": content} if content else {}
        if thought:
            made["reasoning_content"] = thought
        if calls:
            made["tool_calls"] = [{"index": first + i, **call.document} for i, call in enumerate(calls)]
        held_back = self._reasoning or self._calls
        if not made and (not self.begun if last else not held_back):
            made["content"] = ""  # a token without text is one all the same
        return made if self.begun or not made else {"role": "assistant", **made}


class _Run:
    def __init__(
        self, context: Context, body: ChatRequest, ticket: Ticket, prompt: list[int], choices: list[_Choice]
    ) -> None:
        self._context, self._body, self._ticket, self._choices = context, body, ticket, choices
        self._usage = Usage([prompt])
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": context.config.served.names[0],
        }

    async def events(self) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        blank = {"usage": None} if with_usage else {}
        async for delta in self._ticket:
            part = self._part(delta)
            if part["delta"] or part["finish_reason"]:
                yield event({**self._head, "choices": [part], **blank})
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._usage.document})
        yield DONE

    async def document(self) -> Object:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": None}, "logprobs": None, "finish_reason": None}
            for i in range(len(self._choices))
        ]
        async for delta in self._ticket:
            part = self._part(delta)
            _join(choices[part["index"]], part)
        for choice in choices:
            message = choice["message"]
            assert isinstance(message, dict)
            if message["content"] is None and "tool_calls" not in message:
                message["content"] = ""
        whole = {**self._head, "object": "chat.completion"}
        return {**whole, "choices": choices, "usage": self._usage.document}

    def _part(self, delta: Delta) -> Object:
        """What a delta adds to its choice, in the form of a streamed choice."""
        self._usage.add(0, delta)
        choice, reason = self._choices[delta.index], delta.finish_reason
        if self._body.logprobs:
            choice.waiting += logprobs.chat(
                self._context.spelling, choice.before, delta.token_ids, delta.logprobs, delta.top
            )
        choice.before = delta.token_ids[-1] if delta.token_ids else choice.before
        added = choice.push(delta.text, last=reason is not None)
        spelled = None
        if added or reason:
            choice.begun = True
            if self._body.logprobs:
                spelled, choice.waiting = {"content": choice.waiting, "refusal": None}, []
        named = "tool_calls" if reason == "stop" and choice.calls else reason
        part: Object = {"index": delta.index, "delta": added, "logprobs": spelled, "finish_reason": named}
        return {**part, "stop_reason": delta.stop_reason} if reason else part


def _join(whole: Object, part: Object) -> None:
    """Add a streamed choice to what there is of it."""
    message, added = whole["message"], part["delta"]
    for name in ("content", "reasoning_content"):
        if name in added:
            message[name] = (message.get(name) or "") + added[name]
    for call in added.get("tool_calls", ()):
        message.setdefault("tool_calls", []).append({k: v for k, v in call.items() if k != "index"})
    if part["logprobs"]:
        if whole["logprobs"] is None:
            whole["logprobs"] = part["logprobs"]
        else:
            whole["logprobs"]["content"] += part["logprobs"]["content"]
    if part["finish_reason"]:
        whole["finish_reason"], whole["stop_reason"] = part["finish_reason"], part["stop_reason"]
