"""GET /: the playground, one page that needs nothing but this server."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def register(app: FastAPI) -> None:
    app.get("/", include_in_schema=False)(index)


async def index() -> Response:
    page = resources.files("hasten.server").joinpath("playground.html").read_bytes()
    return Response(page, media_type="text/html", headers=HEADERS)
