"""POST /tokenize: the tokens of a text, or of a conversation after the chat template."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request
from starlette.responses import Response

from hasten.server import prepare
from hasten.server.answers import TOKENS, gives
from hasten.server.app import ERRORS, of, read, takes
from hasten.server.errors import unsupported
from hasten.server.protocol import ChatRequest, TokenizeRequest
from hasten.server.streams import Json, encoded_apart


def register(app: FastAPI) -> None:
    app.post("/tokenize", responses={200: gives(TOKENS), **ERRORS}, openapi_extra=takes(TokenizeRequest))(tokenize)


async def tokenize(request: Request) -> Response:
    """Token ids of `prompt` (with the tokens that the tokenizer adds, unless told not to) or of `messages`."""
    context, body = of(request), await read(request, TokenizeRequest)
    config = context.config
    prepare.check_model(config.served, body.model)
    if body.messages is not None:
        if body.add_generation_prompt is False:
            raise unsupported("add_generation_prompt", "only true")
        chat = ChatRequest.model_construct(messages=body.messages)
        text, special = await prepare.chat_text(chat, config, None), bool(body.add_special_tokens)
        field = "messages"
    else:
        assert body.prompt is not None
        text, special, field = body.prompt, body.add_special_tokens is not False, "prompt"
    tokens = await context.encoder.encode(text, special, field)
    made = {"count": len(tokens), "max_model_len": config.served.context, "tokens": tokens}
    if body.return_token_strs:
        tokenizer = config.served.tokenizer
        made["token_strs"] = await asyncio.to_thread(lambda: [tokenizer.token(t) for t in tokens])
    return Json(await encoded_apart(made))
