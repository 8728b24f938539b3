"""POST /v1/embeddings: refused, in words that say why."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from hasten.server.app import ERRORS, REFUSALS, of
from hasten.server.errors import RequestError


def register(app: FastAPI) -> None:
    app.post("/v1/embeddings", status_code=400, responses={400: ERRORS[400], **REFUSALS})(embeddings)


async def embeddings(request: Request) -> Response:
    """Language models that write text give no embeddings."""
    name = of(request).config.served.names[0]
    raise RequestError(f"{name} writes text and gives no embeddings", "model", code="unsupported_model")
