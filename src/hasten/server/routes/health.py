"""GET /health: 200 while requests are answered; 503 while draining, after a second fault, or when a step hangs."""

from __future__ import annotations

import dataclasses

from fastapi import FastAPI, Request
from starlette.responses import Response

from hasten.server.answers import HEALTH, gives
from hasten.server.app import of
from hasten.server.streams import Json


def register(app: FastAPI) -> None:
    unwell = {**gives(HEALTH), "description": "not answering requests; the body says why"}
    app.get("/health", responses={200: gives(HEALTH), 503: unwell})(health)


async def health(request: Request) -> Response:
    """The state of the engine; no API key is asked for."""
    found = of(request).service.health()
    return Json(dataclasses.asdict(found), 200 if found.ok else 503)
