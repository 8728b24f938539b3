"""GET /v1/models: the one model that is served, by all its names."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from hasten.server.answers import MODEL, MODELS, gives
from hasten.server.app import ERRORS, REFUSALS, of
from hasten.server.errors import RequestError


def register(app: FastAPI) -> None:
    app.get("/v1/models", responses={200: gives(MODELS), **REFUSALS})(models)
    app.get("/v1/models/{name:path}", responses={200: gives(MODEL), **REFUSALS, 404: ERRORS[404]})(model)


async def models(request: Request) -> dict[str, Any]:
    """Every name that requests may give as `model`."""
    return {"object": "list", "data": [_described(request, name) for name in of(request).config.served.names]}


async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    if name not in of(request).config.served.names:
        raise RequestError(f"there is no model '{name[:200]}' here", "model", status=404, code="model_not_found")
    return _described(request, name)


def _described(request: Request, name: str) -> dict[str, Any]:
    served = of(request).config.served
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "hasten",
        "root": served.names[0],
        "max_model_len": served.context,
        "chat": bool(served.template),
    }
