"""From what a client sent to what the engine takes: sampling, bounds, and the text of a conversation."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from hasten.engine.request import SamplingParams, StructuredOutputsParams
from hasten.server.config import Config, HttpLimits, Served
from hasten.server.errors import RequestError, unsupported
from hasten.server.protocol import ChatRequest, Generation, Message

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "bad_words", "allowed_token_ids", "seed", "n"),
    *("min_tokens", "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output"),
)
"""Fields that SamplingParams takes under the same name."""
REFUSED = {"suffix": "", "spaces_between_special_tokens": True}
"""Fields that are refused, with the values that ask for nothing."""
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may say for requests that do not."""
STRUCTURED = frozenset(field.name for field in dataclasses.fields(StructuredOutputsParams))


def check_model(served: Served, name: str | None) -> None:
    """Raise RequestError (404) where a request names another model."""
    if name is not None and name not in served.names:
        message = f"there is no model '{name[:200]}' here; this server has {served.names[0]}"
        raise RequestError(message, "model", status=404, code="model_not_found")


def sampling(request: Generation, config: Config, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """How to draw. Raises RequestError for what is refused, InputError for values that make no sense."""
    _check_bounds(request, config.limits)
    for name, neutral in REFUSED.items():
        if getattr(request, name, None) not in (None, neutral):
            raise unsupported(name)
    if request.best_of not in (None, request.n or 1):
        raise unsupported("best_of", "only the value of n is")
    values: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs}
    for name in SAMPLING:
        value = getattr(request, name)
        if value is None and name in DEFAULTS:
            value = config.served.generation.get(name)
        if value is not None:
            values[name] = value
    if request.temperature is None and config.served.generation.get("do_sample") is False:
        values["temperature"] = 0.0
    if guided := structured(request):
        values["structured_outputs"] = guided
    if request.seed is not None and -(2**63) <= request.seed < 0:
        values["seed"] = request.seed % 2**64
    return SamplingParams(**values)


def structured(request: Generation) -> StructuredOutputsParams | None:
    """What the output must look like, by `structured_outputs` as vLLM has it or OpenAI's `response_format`.

    Raises RequestError or InputError where that makes no sense; whether a schema is one is known when it is compiled.
    """
    given, format = request.structured_outputs, request.response_format
    kind = format.get("type") if format else "text"
    if given is not None:
        if kind != "text":
            raise RequestError("response_format and structured_outputs are both given; give one", "response_format")
        unknown = next((name for name in given if name not in STRUCTURED), None)
        if unknown is not None:
            name = f"structured_outputs.{unknown[:60]}"
            raise RequestError(f"unknown field '{name}'", name, code="unknown_parameter")
        return StructuredOutputsParams(**given)
    if format is None or (kind == "text" and set(format) == {"type"}):
        return None
    if kind == "json_object" and set(format) == {"type"}:
        return StructuredOutputsParams(json_object=True)
    described = format.get("json_schema")
    if kind != "json_schema" or not isinstance(described, dict) or set(format) != {"type", "json_schema"}:
        known = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}'
        raise RequestError(f"response_format must be {known}", "response_format")
    unknown = next((name for name in described if name not in ("name", "description", "schema", "strict")), None)
    if unknown is not None or not isinstance(described.get("schema"), dict):
        name = f"response_format.json_schema.{unknown or 'schema'}"[:100]
        raise RequestError(f"{name} is {'unknown' if unknown else 'missing, or no object'}", name)
    return StructuredOutputsParams(json=described["schema"])


def called(request: Generation) -> str:
    """The request's own field that says what the output must look like; "" where that is structured_outputs."""
    kind = request.response_format.get("type") if request.response_format else None
    return {"json_schema": "response_format.json_schema.schema", "json_object": "response_format"}.get(str(kind), "")


def _check_bounds(request: Generation, limits: HttpLimits) -> None:
    """What SamplingParams would take, and a server should not."""
    if request.n is not None and not 1 <= request.n <= limits.n:
        raise RequestError(f"n is {request.n}, must be between 1 and {limits.n}", "n")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > limits.stops or any(not 0 < len(stop) <= limits.stop_length for stop in stops):
        allowed = f"{limits.stops} texts of 1 to {limits.stop_length} characters"
        raise RequestError(f"stop may hold at most {allowed}", "stop")
    for name in ("stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids"):
        if len(getattr(request, name) or ()) > limits.ids:
            raise RequestError(f"{name} may hold at most {limits.ids}", name)
    if any(len(word) > limits.stop_length for word in request.bad_words or ()):
        raise RequestError(f"bad_words may have at most {limits.stop_length} characters each", "bad_words")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options only goes with stream: true", "stream_options")
    check_logprobs("prompt_logprobs", request.prompt_logprobs, limits)
    salt = request.cache_salt
    if salt is not None and not 0 < len(salt) <= limits.stop_length:
        raise RequestError(f"cache_salt must have 1 to {limits.stop_length} characters", "cache_salt")


def check_logprobs(name: str, value: int | None, limits: HttpLimits) -> None:
    if value is not None and not 0 <= value <= limits.logprobs:
        raise RequestError(f"{name} is {value}, must be between 0 and {limits.logprobs}", name)


def check_values(
    prompts: Sequence[list[int]], params: SamplingParams, how: dict[str, Any], config: Config, names: tuple[str, str]
) -> None:
    """Raise RequestError where an answer would hold too many log-probabilities: `params.logprobs` beside each token
    that is drawn, and how["prompt_logprobs"] beside those of prompts. `names`: the fields that ask for them, in this
    order."""
    scored, context = how.get("prompt_logprobs"), config.served.context
    of_prompts = 0 if scored is None else sum(map(len, prompts)) * (scored + 1)
    of_answers = 0
    if params.logprobs is not None and how.get("draws", True):
        room = (max(0, context - len(prompt)) for prompt in prompts)
        of_answers = sum(min(params.max_tokens or context, r) for r in room) * (params.logprobs + 1)
    values, most = (of_prompts + of_answers) * params.n, config.limits.values
    if values > most:
        name = names[of_prompts > of_answers]
        raise RequestError(f"{name} asks for up to {values} log-probabilities, at most {most} are given", name)


def handling(request: Generation) -> dict[str, Any]:
    """What else the engine is told of a request: the arguments of Engine.add by their names."""
    how: dict[str, Any] = {"priority": request.priority or 0, "cache_salt": request.cache_salt or ""}
    if request.skip_special_tokens is False:
        how["skip_special_tokens"] = False
    return how


async def chat_text(request: ChatRequest, config: Config, tools: list[dict[str, Any]] | None) -> str:
    """The prompt that the chat template makes, on another thread: a template may take its time.

    Raises InputError where it refuses the messages, CheckpointError where it is missing or at fault.
    """
    served, limits = config.served, config.limits
    if not 0 < len(request.messages) <= limits.messages:
        raise RequestError(f"messages must hold 1 to {limits.messages}", "messages")
    values = _template_values(request, served)
    messages = [template_message(m, i) for i, m in enumerate(request.messages)]

    def render() -> str:
        return served.tokenizer.apply_chat_template(messages, True, tools=tools, **values)

    return await asyncio.to_thread(render)


def _template_values(request: ChatRequest, served: Served) -> dict[str, Any]:
    """Variables that a client may set: plain ones, that the template itself names, and none that we set."""
    values = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        if "reasoning_effort" not in served.template:
            raise unsupported("reasoning_effort", "this model's chat template knows none")
        values["reasoning_effort"] = request.reasoning_effort
    ours = {"messages", "tools", "documents", "add_generation_prompt", *served.tokenizer.special_tokens}
    for name, value in values.items():
        field = f"chat_template_kwargs.{name[:60]}"
        if name in ours or name not in served.template:
            raise RequestError(f"{field} is nothing that this model's chat template lets a client set", field)
        plain = isinstance(value, bool | float | int) or (isinstance(value, str) and len(value) <= 256)
        if not plain or (isinstance(value, int) and abs(value) > 2**31):
            raise RequestError(f"{field} must be a short text, a number or a truth value", field)
    return values


def template_message(message: Message, index: int) -> dict[str, Any]:
    """A message as chat templates read it: tool calls' arguments as objects, no field that was not given."""
    made: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    made["content"] = message.content if message.content is not None else ""
    if message.content is None and message.role not in ("assistant",):
        raise RequestError(f"messages[{index}].content is missing", f"messages[{index}].content")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.tool_calls:
        made["tool_calls"] = [
            _tool_call(c, f"messages[{index}].tool_calls[{i}]") for i, c in enumerate(message.tool_calls)
        ]
    return made


def _tool_call(call: dict[str, Any], at: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{at} has no function with a name", at)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(f"{at}.function.arguments is not JSON", at) from None
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}
