"""POST /v1/completions: texts that go on from prompts, or log-probabilities of prompts (`echo` with `logprobs`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from hasten.engine.request import SamplingParams
from hasten.errors import InputError
from hasten.server import logprobs, prepare
from hasten.server.answers import COMPLETION, gives
from hasten.server.app import ERRORS, Context, of, read, takes
from hasten.server.errors import as_request_error, unsupported
from hasten.server.protocol import CompletionRequest
from hasten.server.streams import EventStream, Json, answer, encoded_apart, merged
from hasten.server.ticket import Delta, Ticket
from hasten.server.usage import Usage, events, head

DEFAULT_TOKENS = 16


def register(app: FastAPI) -> None:
    app.post(
        "/v1/completions",
        responses={200: gives(COMPLETION, streams=True), **ERRORS},
        openapi_extra=takes(CompletionRequest),
    )(completions)


async def completions(request: Request) -> Response:
    """Continue one prompt or several: texts, or token ids."""
    context, body = of(request), await read(request, CompletionRequest)
    prepare.check_model(context.config.served, body.model)
    params, how = _sampling(body, context)
    prompts = await context.encoder.prompts(body)
    names = ("logprobs", "logprobs" if body.echo and body.logprobs is not None else "prompt_logprobs")
    prepare.check_values(prompts, params, how, context.config, names)
    context.check_room(len(prompts), params.n)
    try:
        how |= await context.bounds(params, prompts=len(prompts))
    except InputError as error:
        raise as_request_error(error, schema=prepare.called(body)) from None
    tickets: list[Ticket] = []
    try:
        for prompt in prompts:
            tickets.append(context.service.submit(prompt, params, **how))
    except BaseException:
        _cancel(tickets)
        raise
    run = _Run(context, body, params, prompts, tickets)
    if body.stream:
        return EventStream(events(run.parts(), run.head, run.usage, body), lambda: _cancel(tickets))
    return Json(await encoded_apart(await answer(request, tickets, run.document())))


def _cancel(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


def _sampling(body: CompletionRequest, context: Context) -> tuple[SamplingParams, dict[str, Any]]:
    limits = context.config.limits
    prepare.check_logprobs("logprobs", body.logprobs, limits)
    wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    draws = wanted != 0 or not body.echo  # nothing but the prompt is asked for: it is only scored
    how = prepare.handling(body)
    if body.echo and body.logprobs is not None:
        how["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    elif body.prompt_logprobs is not None:
        how["prompt_logprobs"] = body.prompt_logprobs
    if body.prompt_logprobs is not None and body.stream:
        raise unsupported("prompt_logprobs", "with stream it is not; echo with logprobs is")
    if not draws:
        how["draws"] = False
    return prepare.sampling(body, context.config, wanted if draws else 1, body.logprobs), how


class _Choice:
    """One choice on its way: where its text and tokens are, for offsets and for what stands before a token."""

    def __init__(self, prompt: list[int]) -> None:
        self.before: int | None = prompt[-1]
        self.offset = 0
        self.begun = False


class _Run:
    def __init__(
        self,
        context: Context,
        body: CompletionRequest,
        params: SamplingParams,
        prompts: list[list[int]],
        tickets: list[Ticket],
    ) -> None:
        self._context, self._body, self._params = context, body, params
        self._prompts, self._tickets = prompts, tickets
        self._choices = [_Choice(prompt) for prompt in prompts for _ in range(params.n)]
        self.usage = Usage(prompts)
        self.head = head(context.config.served, "cmpl", "text_completion")

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        """What comes of each choice, as it comes."""
        async for number, delta in merged(self._tickets):
            self.usage.add(number, delta)
            if delta.prompt_scores:  # to spell a whole prompt's log-probabilities takes its time
                yield await asyncio.to_thread(self._part, number, delta)
            else:
                yield self._part(number, delta)

    async def document(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = [{} for _ in self._choices]
        async for part in self.parts():
            _join(choices[part["index"]], part)
        return {**self.head, "choices": choices, "usage": self.usage.document}

    def _part(self, number: int, delta: Delta) -> dict[str, Any]:
        """What a delta adds to its choice, in the form of a streamed choice."""
        index = number * self._params.n + delta.index
        choice, prompt = self._choices[index], self._prompts[number]
        part: dict[str, Any] = {"index": index, "text": "", "logprobs": None, "finish_reason": delta.finish_reason}
        part["stop_reason"] = delta.stop_reason
        pieces = []
        if not choice.begun:
            choice.begun = True
            if self._body.echo:
                part["text"] = self._prompt_text(number)
                pieces.append(self._prompt_logprobs(prompt, delta, choice))
                choice.offset = len(part["text"])
            if self._body.prompt_logprobs is not None and delta.prompt_scores:
                scores, count = delta.prompt_scores, self._body.prompt_logprobs
                top = [row[:count] for row in scores.likeliest]
                part["prompt_logprobs"] = logprobs.prompt(self._context.spelling, prompt, scores.logprobs, top)
        if self._body.logprobs is not None:
            values: list[float | None] = [*delta.logprobs]
            spelled = logprobs.completion(
                self._context.spelling, choice.before, delta.token_ids, values, delta.top, choice.offset
            )
            part["logprobs"] = _joined([p for p in (*pieces, spelled) if p])
        part["text"] += delta.text
        choice.offset += len(delta.text)
        choice.before = delta.token_ids[-1] if delta.token_ids else choice.before
        return part

    def _prompt_text(self, number: int) -> str:
        given = self._body.prompt
        if isinstance(given, str):
            given = [given]
        if isinstance(given[0], str) and self._body.truncate_prompt_tokens is None:
            return str(given[number])
        return self._context.config.served.tokenizer.decode(self._prompts[number], skip_special=False)

    def _prompt_logprobs(self, prompt: list[int], delta: Delta, choice: _Choice) -> dict[str, Any] | None:
        scores, count = delta.prompt_scores, self._body.logprobs
        if scores is None or count is None:
            return None
        top = [[], *(row[:count] for row in scores.likeliest)]
        return logprobs.completion(self._context.spelling, None, prompt, [None, *scores.logprobs], top, 0)


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [value for piece in pieces for value in piece[key]] for key in pieces[0]}


def _join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a streamed choice to what there is of it."""
    if not whole:
        whole.update(part)
        return
    whole["text"] += part["text"]
    whole["finish_reason"], whole["stop_reason"] = part["finish_reason"], part["stop_reason"]
    if part["logprobs"]:
        for key, values in part["logprobs"].items():
            whole["logprobs"][key] += values
