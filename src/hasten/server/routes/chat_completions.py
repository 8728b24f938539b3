"""POST /v1/chat/completions: answers in a conversation, through the model's own chat template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from hasten.engine.request import PromptScores, SamplingParams, StructuredOutputsParams
from hasten.errors import InputError
from hasten.server import logprobs, prepare, reasoning, tool_choice, tools
from hasten.server.answers import CHAT_COMPLETION, gives
from hasten.server.app import ERRORS, Context, of, read, takes
from hasten.server.errors import RequestError, as_request_error, unsupported
from hasten.server.protocol import ChatRequest
from hasten.server.streams import EventStream, Json, answer, encoded_apart
from hasten.server.ticket import Delta, Ticket
from hasten.server.tool_choice import Offer
from hasten.server.usage import Usage, events, head

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
    if body.prompt_logprobs is not None:
        how["prompt_logprobs"] = body.prompt_logprobs
    offered = tool_choice.offer(body, context.config)
    text = await prepare.chat_text(body, context.config, offered.tools if offered else None)
    if offered and tool_choice.special_marks(offered, served.tokenizer):
        how["skip_special_tokens"] = False
    if offered and offered.must:
        wanted = tool_choice.grammar(offered, served.template, served.tokenizer)
        params = replace(params, structured_outputs=StructuredOutputsParams(grammar=wanted))
    try:
        prompt = await context.encoder.prompt(text, body, special=False, field="messages")
        names = ("top_logprobs" if body.top_logprobs else "logprobs", "prompt_logprobs")
        prepare.check_values([prompt], params, how, context.config, names)
        context.check_room(1, params.n)
        how |= await context.bounds(params, reasoning.thought(served.template, text))
        ticket = context.service.submit(prompt, params, **how)
    except InputError as error:
        if offered and offered.must and "structured_outputs.grammar" in error.message:
            loop, guidance = asyncio.get_running_loop(), context.service.engine.guidance
            raise await loop.run_in_executor(context.compilers, tool_choice.fault, offered, guidance, error) from None
        raise as_request_error(error, "messages", prepare.called(body)) from None
    inside = reasoning.opened(text) if reasoning.thinks(served.template) else None
    run = _Run(context, body, ticket, prompt, [_Choice(prompt[-1], inside, offered) for _ in range(params.n)])
    if body.stream:
        return EventStream(events(run.shown(), run.head, run.usage, body), ticket.cancel)
    return Json(await encoded_apart(await answer(request, [ticket], run.document())))


def _sampling(body: ChatRequest, context: Context) -> SamplingParams:
    if body.prompt_logprobs is not None and body.stream:
        raise unsupported("prompt_logprobs", "with stream it is not")
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


class _Choice:
    """One answer on its way: text in, what it adds to thought, answer and calls out."""

    def __init__(self, before: int, inside: bool | None, offered: Offer | None) -> None:
        self.before = before
        self.begun = False
        self.waiting: list[Object] = []  # log-probabilities of text that is held back
        self._reasoning = None if inside is None else reasoning.Reasoning(inside)
        self._calls = tools.ToolCalls(offered.family, offered.one) if offered else None
        self._reason = "stop" if offered and offered.named else "tool_calls"
        self._must = offered is not None and offered.must

    @property
    def calls(self) -> int:
        return self._calls.count if self._calls else 0

    def reason(self, given: str | None) -> str | None:
        """Why it ended, as OpenAI has it: a named tool's call is a "stop". The only call that may be ends it too."""
        full = self._calls is not None and self._calls.full
        if full and not self._must:  # else a grammar ends it
            return self._reason
        return self._reason if given == "stop" and self.calls else given

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
        self._prompt, self._prompt_logprobs = prompt, list[Any]()
        self.usage = Usage([prompt])
        self.head = head(context.config.served, "chatcmpl", "chat.completion.chunk")

    async def _parts(self) -> AsyncIterator[Object]:
        """What comes of each choice, as it comes, until each has ended."""
        going = set(range(len(self._choices)))
        async for delta in self._ticket:
            if delta.prompt_scores and not self._prompt_logprobs:
                self._prompt_logprobs = await asyncio.to_thread(self._spelled_prompt, delta.prompt_scores)
            if delta.index in going:
                part = self._part(delta)
                going -= {delta.index} if part["finish_reason"] else set()
                yield part
            if not going:
                self._ticket.cancel()
                return

    async def shown(self) -> AsyncIterator[Object]:
        """Parts that tell a client something."""
        async for part in self._parts():
            if part["delta"] or part["finish_reason"]:
                yield part

    def _spelled_prompt(self, scores: PromptScores) -> list[Any]:
        return logprobs.prompt(self._context.spelling, self._prompt, scores.logprobs, scores.likeliest)

    async def document(self) -> Object:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": None}, "logprobs": None, "finish_reason": None}
            for i in range(len(self._choices))
        ]
        async for part in self._parts():
            _join(choices[part["index"]], part)
        for choice in choices:
            message = choice["message"]
            assert isinstance(message, dict)
            if message["content"] is None and "tool_calls" not in message:
                message["content"] = ""
        whole = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage.document}
        return {**whole, "prompt_logprobs": self._prompt_logprobs} if self._prompt_logprobs else whole

    def _part(self, delta: Delta) -> Object:
        """What a delta adds to its choice, in the form of a streamed choice."""
        self.usage.add(0, delta)
        choice = self._choices[delta.index]
        if self._body.logprobs:
            choice.waiting += logprobs.chat(
                self._context.spelling, choice.before, delta.token_ids, delta.logprobs, delta.top
            )
        choice.before = delta.token_ids[-1] if delta.token_ids else choice.before
        added = choice.push(delta.text, last=delta.finish_reason is not None)
        reason = choice.reason(delta.finish_reason)
        spelled = None
        if added or reason:
            choice.begun = True
            if self._body.logprobs:
                spelled, choice.waiting = {"content": choice.waiting, "refusal": None}, []
        part: Object = {"index": delta.index, "delta": added, "logprobs": spelled, "finish_reason": reason}
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
