"""Refusals in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hasten.errors import CheckpointError, ContextError, DependencyError, HastenError, InputError
from hasten.server.ticket import EngineFault, GivenUp, Overloaded, Unavailable

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """What a client did wrong, or cannot have. `param` names the field."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        self.headers = dict(headers or {})

    @property
    def document(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unsupported(name: str, why: str = "") -> RequestError:
    """A field that is known and refused."""
    return RequestError(f"{name} is not supported{': ' + why if why else ''}", name, code="unsupported_parameter")


NAMED = re.compile(r"([a-z_.]+)(?: (?:is|has|takes|names|holds|needs?)|(?:,| and) .* leave) ")
"""How our errors begin where they are about a field."""


def as_request_error(error: BaseException, prompt: str = "prompt", schema: str = "") -> RequestError:
    """What a client is told of any exception; of our own bugs it is told nothing but that.

    `prompt` and `schema`: how its request calls the prompt, and what its structured output must be.
    """
    match error:
        case RequestError():
            return error
        case Overloaded():
            wait = {"Retry-After": str(error.retry_after)}
            return RequestError(str(error), status=429, code="overloaded", headers=wait)
        case Unavailable():
            return RequestError(str(error), status=503, code="unavailable", headers={"Retry-After": "5"})
        case EngineFault():
            return RequestError(f"the engine failed: {error}", status=500, code="engine_fault")
        case GivenUp():
            return RequestError(str(error), status=500, code="structured_output_given_up")
        case ContextError():
            return RequestError(_with_hint(error), prompt, code="context_length_exceeded")
        case DependencyError():
            return RequestError(_with_hint(error), code="unsupported_parameter")
        case InputError() | CheckpointError():  # the latter: a chat template that is missing or at fault
            message = _with_hint(error)
            message = re.sub(r"structured_outputs\.json(_object)?\b", schema, message, count=1) if schema else message
            named = NAMED.match(message)
            of_prompt = message.startswith(("the prompt", "the text", "token id"))
            return RequestError(message, named[1] if named else prompt if of_prompt else None)
    return RequestError("internal error", status=500, code="internal_error")


def _with_hint(error: HastenError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message
