"""POST /detokenize: the text of tokens."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request
from starlette.responses import Response

from hasten.server import prepare
from hasten.server.answers import DETOKENIZED, gives
from hasten.server.app import ERRORS, of, read, takes
from hasten.server.errors import RequestError
from hasten.server.protocol import DetokenizeRequest
from hasten.server.streams import Json


def register(app: FastAPI) -> None:
    app.post("/detokenize", responses={200: gives(DETOKENIZED), **ERRORS}, openapi_extra=takes(DetokenizeRequest))(
        detokenize
    )


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    config, body = of(request).config, await read(request, DetokenizeRequest)
    served, most = config.served, config.limits.prompt_characters
    prepare.check_model(served, body.model)
    if len(body.tokens) > most:
        raise RequestError(f"tokens holds {len(body.tokens)}, at most {most} are taken", "tokens")
    wrong = next((t for t in body.tokens if not 0 <= t < served.vocabulary), None)
    if wrong is not None:
        message = f"token id {wrong} is not in the vocabulary of {served.vocabulary} tokens"
        raise RequestError(message, "tokens")
    text = await asyncio.to_thread(served.tokenizer.decode, body.tokens, skip_special=False)
    return Json({"prompt": text})
