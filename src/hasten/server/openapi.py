"""GET /openapi.json: the routes' own description, with bodies, bounds and errors that FastAPI does not see."""

from __future__ import annotations

from typing import Any

import fastapi
from fastapi import FastAPI

from hasten.engine.request import COLDEST, HOTTEST, MAX_BIAS
from hasten.server import prepare, tools
from hasten.server.answers import ERROR, TEXT, Schema, constant, made
from hasten.server.config import Config

LARGEST = 2**31 - 1
OBJECT: Schema = {"type": "object"}
TOOL = made({"type": constant("function"), "function": made({"name": TEXT})})
RESPONSE_FORMATS: list[Schema] = [
    {**made({"type": {"enum": ["text", "json_object"]}}), "additionalProperties": False},
    {
        **made({"type": constant("json_schema"), "json_schema": made({"schema": OBJECT}, name={}, strict={})}),
        "additionalProperties": False,
    },
]
STRUCTURED_OUTPUTS: dict[str, Schema] = {
    "json": {"type": ["string", "object", "null"]},
    "regex": {"type": ["string", "null"], "minLength": 1},
    "choice": {"type": ["array", "null"], "items": {"type": "string", "minLength": 1}, "minItems": 1},
    "grammar": {"type": ["string", "null"], "minLength": 1},
    "json_object": {"type": ["boolean", "null"]},
}


def describe(app: FastAPI, config: Config) -> Schema:
    """The OpenAPI document of `app`, true of a server with this `config`: its limits and its model's vocabulary."""
    models = {}
    for route in app.routes:
        if isinstance(route, fastapi.routing.APIRoute) and route.openapi_extra:
            model = route.openapi_extra.pop("x-body")
            models[model.__name__] = model
    document = app.openapi()
    components = document.setdefault("components", {})
    schemas = components["schemas"] = {"Error": ERROR}  # what FastAPI puts here is its own form of errors, not ours
    for name, model in models.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
        for field, limits in bounds(config, name).items():
            if field in schema["properties"]:
                schema["properties"][field] = _bounded(schema["properties"][field], limits)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            _complete(operation, guarded=bool(config.api_keys) and path != "/health")
    if config.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def bounds(config: Config, model: str) -> dict[str, Schema]:
    """By field: what the server holds its values to, where they are no `null`. Keywords of other types are of no
    effect, as JSON schema has it, so that one entry serves a text and a list of texts alike.
    """
    limits, tokens = config.limits, _between(0, config.served.vocabulary - 1)
    stop = {"minLength": 1, "maxLength": limits.stop_length}
    found: dict[str, Schema] = {
        "temperature": {"anyOf": [{"const": 0}, _between(COLDEST, HOTTEST)]},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": _between(-1, LARGEST),
        "min_p": _between(0, 1),
        "typical_p": {"exclusiveMinimum": 0, "maximum": 1},
        "presence_penalty": _between(-2, 2),
        "frequency_penalty": _between(-2, 2),
        "repetition_penalty": _between(0.01, 100),
        "logit_bias": {
            "maxProperties": limits.ids,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", **_between(-MAX_BIAS, MAX_BIAS)},
        },
        "bad_words": {"maxItems": limits.ids, "items": {"type": "string", **stop}},
        "allowed_token_ids": {"minItems": 1, "maxItems": limits.ids},
        "stop_token_ids": {"maxItems": limits.ids},
        "seed": _between(-(2**63), 2**64 - 1),
        "n": _between(1, limits.n),
        "best_of": _between(1, limits.n),
        "max_tokens": _between(0 if model == "CompletionRequest" else 1, LARGEST),
        "max_completion_tokens": _between(1, LARGEST),
        "min_tokens": _between(0, LARGEST),
        "stop": {**stop, "maxItems": limits.stops, "items": {"type": "string", **stop}},
        "prompt_logprobs": _between(0, limits.logprobs),
        "top_logprobs": _between(0, limits.logprobs),
        "truncate_prompt_tokens": {"minimum": 1},
        "priority": _between(-100, 100),
        "cache_salt": stop,
        "messages": {"minItems": 1, "maxItems": limits.messages},
        "tools": {"maxItems": limits.tools, "items": TOOL},
        "tokens": {"items": {"type": "integer", **tokens}},
    }
    found["response_format"] = {"anyOf": RESPONSE_FORMATS}
    found["structured_outputs"] = {"properties": STRUCTURED_OUTPUTS, "additionalProperties": False, "minProperties": 1}
    if tools.family(config.served.template) is None:
        found["tools"] = {"maxItems": 0}
    for name, taken in prepare.REFUSED.items():
        found[name] = {"enum": [taken]}
    if model == "CompletionRequest":
        found["logprobs"] = _between(0, limits.logprobs)
        found["prompt"] = {"maxItems": max(limits.prompts, config.served.context)}
    return found


def _between(least: float, most: float) -> Schema:
    return {"minimum": least, "maximum": most}


def _bounded(schema: Schema, limits: Schema) -> Schema:
    """`schema` with `limits` in each of its kinds but null."""
    if "anyOf" in schema:
        kinds = [kind if kind.get("type") == "null" else _bounded(kind, limits) for kind in schema["anyOf"]]
        return {**schema, "anyOf": kinds}
    return {**schema, **{key: value for key, value in limits.items() if _concerns(key, schema.get("type"))}}


KEYWORDS = {
    "string": ("minLength", "maxLength", "enum"),
    "array": ("minItems", "maxItems", "items"),
    "object": ("minProperties", "maxProperties", "properties", "propertyNames", "additionalProperties", "anyOf"),
    "boolean": ("enum",),
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "anyOf"),
}


def _concerns(keyword: str, kind: Any) -> bool:
    return keyword in KEYWORDS.get(kind, ())


def _complete(operation: dict[str, Any], guarded: bool) -> None:
    """Errors in their one form, in the operations' descriptions, and whether a key is asked for."""
    operation["responses"].pop("422", None)  # FastAPI's own form of refusal, which nothing here gives
    for status, response in operation["responses"].items():
        if status != "200" and not response.get("content"):
            response["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation["security"] = [{"key": []}] if guarded else []
