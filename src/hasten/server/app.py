"""The application: routes by their file names, errors in OpenAI's shape, and the guard before all of it."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hasten.engine.guidance import Thought
from hasten.engine.request import SamplingParams
from hasten.errors import HastenError
from hasten.server import routes
from hasten.server.config import Config
from hasten.server.encoding import Encoder
from hasten.server.errors import RequestError
from hasten.server.logprobs import Spelling
from hasten.server.middleware import Guard
from hasten.server.openapi import describe
from hasten.server.protocol import Body, Strict, parse
from hasten.server.service import Service
from hasten.server.streams import error_response
from hasten.server.ticket import EngineFault, Overloaded, Unavailable

LARGE = 1 << 16
"""Bytes of a body that are parsed on another thread."""
COMPILERS = 2
"""Grammars that are compiled at once; more wait."""
Made = TypeVar("Made")
Handler = TypeVar("Handler", bound=Callable[..., Coroutine[Any, Any, Response]])


@dataclass
class Context:
    """What every route needs."""

    service: Service
    config: Config
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route and status."""
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self._compiling = 0
        self.compilers = ThreadPoolExecutor(COMPILERS, "hasten-grammar")
        self.encoder = Encoder(self.config)
        self.spelling = Spelling(self.config.served.tokenizer)

    def check_room(self, prompts: int, n: int) -> None:
        """Raise RequestError where so many choices can never be had together, Overloaded where they cannot now."""
        places = self.service.places
        if prompts * n > places:
            name = "n" if prompts == 1 or n > places else "prompt"
            message = f"{name} asks for too much: {prompts} x {n} choices, where at most {places} may run or wait"
            raise RequestError(message, name)
        self.service.check_room(prompts * n)

    async def bounds(self, params: SamplingParams, thought: Thought | None = None, prompts: int = 1) -> dict[str, Any]:
        """The arguments of Engine.add that bind outputs after any `thought`. Raises InputError for invalid ones,
        Overloaded where too many wait for theirs.

        To compile a grammar may take seconds, so it has threads of its own: other requests go on.
        """
        engine, wanted = self.service.engine, params.structured_outputs
        if not (wanted or params.bad_words or params.logit_bias or params.allowed_token_ids):
            return {}

        def make() -> dict[str, Any]:
            grammar = engine.guidance.compile(wanted, thought) if wanted else None
            return {"grammar": grammar, "constraints": engine.constraints(params, grammar)}

        if self._compiling >= COMPILERS + self.config.limits.grammars:
            raise self.service.overloaded()
        self._compiling += 1
        try:
            made = await self._compiled(make)
            grammar, choices = made["grammar"], prompts * params.n
            if grammar is not None:  # those that may begin together; one at a time, so that other requests' go between
                ahead = min(choices, engine.program.limits.max_sequences)
                for _ in range(ahead - 1):
                    await self._compiled(grammar.prepare)
                grammar.prepare_later(choices - ahead, self.compilers.submit)
        finally:
            self._compiling -= 1
        return made

    async def _compiled(self, make: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self.compilers, make)


def create_app(service: Service, config: Config) -> FastAPI:
    """The server as an ASGI application; whoever runs it starts and stops `service`."""
    context = Context(service, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = FastAPI(title="hasten", version=config.version, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.context = context
    for kind in (RequestError, HastenError, Overloaded, Unavailable, EngineFault, HTTPException, Exception):
        app.add_exception_handler(kind, _handle)
    for name in route_names():
        importlib.import_module(f"hasten.server.routes.{name}").register(app)
    app.openapi_schema = describe(app, config)
    app.add_middleware(Guard, config=config, answers=context.answers)
    return app


def route_names() -> list[str]:
    """Every file in routes/ is one; it has `register(app)`."""
    return sorted(module.name for module in pkgutil.iter_modules(routes.__path__))


async def _handle(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such route, or not by this method
        return error_response(RequestError(str(error.detail), status=error.status_code, headers=error.headers))
    return error_response(error)


def of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def read(request: Request, model: type[Body]) -> Body:
    """The body of a request. Raises RequestError where it is not what `model` says, or does not arrive."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # forms and plain text are what other sites can make a browser send
        raise RequestError("content-type must be application/json", "content-type")
    try:
        async with asyncio.timeout(of(request).config.limits.body_seconds):
            raw = await request.body()
    except TimeoutError:
        raise RequestError("the body did not arrive in time", status=408, headers={"Connection": "close"}) from None
    return await asyncio.to_thread(parse, raw, model) if len(raw) > LARGE else parse(raw, model)


def takes(model: type[Strict]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body, which FastAPI does not see because `read` reads it."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "x-body": model,
    }


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "what is wrong with the request, by the field's name"},
    401: {"description": "no API key, or a wrong one"},
    403: {"description": "a Host that is none of this server's names"},
    404: {"description": "no such model"},
    408: {"description": "the body did not arrive in time"},
    413: {"description": "the body is too large"},
    429: {"description": "too many requests; Retry-After says when there may be room"},
    500: {"description": "the engine failed"},
    503: {"description": "the server is shutting down, or its engine is gone"},
}
REFUSALS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 413, 429)}
"""What may come before any route."""
